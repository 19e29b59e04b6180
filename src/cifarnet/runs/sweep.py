"""Sweeps: what a job of a multirun does beside training.

A multirun has one folder. Each job's own folder in it, named by its number, holds Hydra's record of its overrides and,
in the end, `metrics.json`, `pruned.txt` or `error.txt`: whatever is told of a sweep is read from them (`runs.tables`).
"""

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli, hardware
from cifarnet.errors import Pruned, UserError
from cifarnet.permitted import located
from cifarnet.runs import replay
from cifarnet.runs.summary import clear_checkpoints
from cifarnet.runs.tables import read_run

if TYPE_CHECKING:
    from optuna import Trial

Train = Callable[..., float]


def is_job() -> bool:
    """Is this a job of a multirun?"""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run(config: DictConfig, train: Train, trial: "Trial | None" = None) -> float:
    """Train as a job of a multirun: refuse what cannot be compared, keep errors, clear away checkpoints.

    With `sweep.resume`, a job that is done returns its score, and one that was cut off goes on.
    """
    folder = Path(config.output_dir)
    if config.data.get("val_fraction") == 0:
        refuse_blind_sweep(swept(folder.parent))
    (folder / "error.txt").unlink(missing_ok=True)
    if config.sweep.resume is not None:
        done = read_run(folder)
        if done.metrics and _asked(done.metrics["config"]) == _asked(OmegaConf.to_container(config)):
            print(f"Job {folder.name} is done: {done.score:.2%}", flush=True)
            return done.score
    _share_machine(config)
    try:
        score = _train(config, train, trial)
    except Pruned as pruned:
        (folder / "pruned.txt").write_text(f"{pruned}\n", encoding="utf-8")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return math.nan
    except Exception as error:
        message = cli.explain(error) or f"{type(error).__name__}: {error}"
        (folder / "error.txt").write_text(message + "\n", encoding="utf-8")
        print(f"Job {folder.name} failed: {message}", file=sys.stderr, flush=True)
        raise
    clear_checkpoints(folder.parent, config.sweep.keep_checkpoints)
    return score


def _train(config: DictConfig, train: Train, trial: "Trial | None") -> float:
    from cifarnet.runs.stopping import Prune

    callbacks = [] if trial is None else [Prune(trial)]
    last = Path(config.output_dir) / "checkpoints" / "last.ckpt"
    if config.sweep.resume is None or not last.is_file():
        return train(config, callbacks=callbacks)
    from cifarnet import checkpoint

    recorded = checkpoint.read(last)["hyper_parameters"]["config"]
    if _asked(recorded) != _asked(OmegaConf.to_container(config)):
        raise UserError(f"{last} belongs to a run with other settings. Remove it to train this job anew.")
    print(f"Job {last.parent.parent.name} goes on from {os.path.relpath(last)}", flush=True)
    return train(config, last, callbacks)


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what does not say what to train."""
    asked = {key: value for key, value in config.items() if key not in ("sweep", "output_dir", "classes")}
    return asked | {"data": {key: value for key, value in asked["data"].items() if key != "url"}}


def _share_machine(config: DictConfig) -> None:
    """A job's share of the cores, or a GPU of its own, where several run side by side."""
    jobs = HydraConfig.get().launcher.get("n_jobs", 1)
    jobs = jobs if jobs > 0 else hardware.cores()  # joblib's -1 is one a core
    if jobs == 1:
        return
    end_with_parent()
    if config.trainer.accelerator != "cpu":
        hardware.claim_gpu()
    if config.threads is None:
        import torch

        torch.set_num_threads(max(1, hardware.cores() // jobs))


def end_with_parent() -> None:
    """A sweep that was killed leaves no job at work behind, whose folder another sweep may go on with."""
    import psutil

    name = "end with parent"
    if any(thread.name == name for thread in threading.enumerate()):
        return  # an earlier job of this process saw to it
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent):  # on Windows the former stays as it was
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name=name, daemon=True).start()


# how many jobs hydra/launcher=parallel runs at a time: one a GPU; two where there is none
OmegaConf.register_new_resolver("default_jobs", lambda: len(hardware.gpus()) or 2, replace=True)


def refuse_blind_sweep(keys: Sequence[str]) -> None:
    """Without validation images there is nothing to choose by: only seeds may be swept."""
    if chosen := [key for key in keys if key != "seed"]:
        raise UserError(
            f"Sweeping {', '.join(chosen)} with data.val_fraction=0 would leave only the test set to choose by. "
            "Set validation images aside, with data.val_fraction=0.1. (Sweeping seed alone is fine.)"
        )


def swept(sweep_folder: Path) -> list[str]:
    """The keys that a multirun varies, read from its own record."""
    record = OmegaConf.load(sweep_folder / "multirun.yaml")
    arguments = OverridesParser.create().parse_overrides(list(record.hydra.overrides.task))
    keys = [argument.key_or_group for argument in arguments if argument.is_sweep_override()]
    return [*keys, *(record.hydra.sweeper.get("params") or {})]


def resumed_sweep(arguments: Sequence[str]) -> list[str]:
    """The arguments of the multirun that `sweep.resume=<folder>` among these names, and its folder.

    Raises:
        UserError: there is no multirun in that folder, or other arguments are given too.
    """
    folder = Path(cli.value_of("sweep.resume", arguments) or ".")
    record = folder / "multirun.yaml"
    if not record.is_file():
        raise UserError(f"sweep.resume={folder}: there is no multirun in that folder ({record} is missing).")
    others = [a for a in arguments if cli.key_of(a) != "sweep.resume" and a not in ("-m", "--multirun")]
    allowing = [argument for argument in others if cli.key_of(argument) == "classes"]
    if others != allowing:
        raise UserError(f"sweep.resume={folder} repeats that multirun's own arguments: leave out {' '.join(others)}")
    saved = replay.read(record)
    hydra = [line for line in saved.hydra if not line.startswith(("hydra.mode", "hydra.sweep.dir"))]
    task = [line for line in saved.task if cli.key_of(line) not in ("sweep.resume", "classes", "data.url")]
    classes = located(OverridesParser.create().parse_override(allowing[-1]).value()) if allowing else []
    replay.checked([*hydra, *task], record, classes)
    place = cli.literal(str(folder))
    return ["--multirun", *hydra, *task, *allowing, f"hydra.sweep.dir={place}", f"sweep.resume={place}"]
