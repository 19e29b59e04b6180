"""Sweeps: what a job of a multirun does beside training.

A multirun has one folder. Each job's own folder in it, named by its number, holds Hydra's record of its overrides and,
in the end, `metrics.json`, `pruned.txt` or `error.txt`: `records.tables` reads them.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import Interrupted, Pruned, UserError, printable
from cifarnet.records.json_file import read
from cifarnet.records.tables import Run, read_run
from cifarnet.schema import check
from cifarnet.sweeps import parallel, replay
from cifarnet.sweeps.summary import clear_checkpoints, resume_command
from cifarnet.system import files

if TYPE_CHECKING:
    from optuna import Trial

Train = Callable[..., float]


def run_job(config: DictConfig, train: Train, trial: "Trial | None", images: Any) -> float:
    return run(config, functools.partial(train, images=images), trial)


def is_job() -> bool:
    """Is this a job of a multirun?"""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def refuse_launcher() -> None:
    """Hydra would run a single run here, wherever its launcher runs jobs."""
    if (name := HydraConfig.get().runtime.choices["hydra/launcher"]) != "basic":
        raise UserError(f"hydra/launcher={name} launches jobs of a sweep: add -m. (One run makes a sweep too.)")


def run(config: DictConfig, train: Train, trial: "Trial | None" = None) -> float:
    """Train as a job of a multirun: refuse what cannot be compared, keep errors, clear away checkpoints.

    With `sweep.resume`, a job that is done returns its score, and one that was cut off goes on. NaN where there is no
    score: the job was pruned, or the sweep was stopped.
    """
    folder = Path(config.output_dir)
    with parallel.side_by_side(config, folder.name) as beside:
        if stop_file(folder.parent).exists():
            files.remove_if_unused(folder)
            return math.nan
        try:
            return _run(config, train, trial)
        except Pruned as pruned:
            files.write(folder / "pruned.txt", f"{pruned}\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return math.nan
        except Interrupted as stopped:
            if beside:  # the process that started this one tells it, when the others have saved too
                return math.nan
            raise Interrupted(stopped.what, stopped.status, resume_command(folder.parent)) from None
        except Exception as error:
            message = fail(folder, error)
            if config.sweep.stop_at_failure:
                stop_file(folder.parent).touch()
            if not beside:
                raise
            if cli.explain(error) is None:
                traceback.print_exc()
            raise UserError(message) from None  # not every error finds its way to another process


def _run(config: DictConfig, train: Train, trial: "Trial | None") -> float:
    from cifarnet.finetuning import expand  # it brings torch along

    config = expand(config)  # as it is recorded
    folder = Path(config.output_dir)
    (folder / "error.txt").unlink(missing_ok=True)
    if config.data.get("val_fraction") == 0:
        refuse_blind_sweep(swept(folder.parent), config)
    if config.sweep.resume is not None:
        before = read_run(folder)
        if is_done(before, OmegaConf.to_container(config)):
            print(f"Job {folder.name} is done: {before.score:.2%}", flush=True)
            return before.score
        if before.status == "damaged":
            print(printable(f"Job {folder.name}: {before.note}"), flush=True)
    score = _train(config, train, trial)
    clear_checkpoints(folder.parent, config.sweep.keep_checkpoints)
    return score


def is_done(job: Run, config: dict[str, Any]) -> bool:
    """Has it come to its end, with these settings?"""
    return job.record is not None and _asked(job.record.config) == _asked(config)


def fail(folder: Path, error: Exception) -> str:
    """Keep and tell why a job came to nothing."""
    message = cli.explain(error) or f"{type(error).__name__}: {error}"
    print(printable(f"Job {folder.name} failed: {message}"), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # such as a full disk: that is told already
        files.write(folder / "error.txt", message + "\n")
    return message


def raise_failure(result: JobReturn) -> None:
    """Raise what a job raised."""
    with contextlib.redirect_stderr(io.StringIO()):  # Hydra would print the job's overrides before
        result.return_value  # noqa: B018


def _train(config: DictConfig, train: Train, trial: "Trial | None") -> float:
    from cifarnet.callbacks.pruning import Prune

    callbacks, folder = [] if trial is None else [Prune(trial)], Path(config.output_dir)
    last = folder / "checkpoints" / "last.ckpt"
    if config.sweep.resume is None or not last.is_file():
        return train(config, None, callbacks)
    from cifarnet import checkpoint

    try:
        if (best := last.with_name("best.ckpt")).exists():  # needed in the end
            checkpoint.read(best)
        recorded = checkpoint.read(last)["hyper_parameters"]["config"]
    except UserError as error:
        os.replace(last.parent, folder / f"damaged_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
        print(printable(f"Job {folder.name} is trained anew: {error}"), flush=True)
        return train(config, None, callbacks)
    if _asked(recorded) != _asked(OmegaConf.to_container(config)):
        raise UserError(f"{last} belongs to a run with other settings. Remove it to train this job anew.")
    print(f"Job {folder.name} goes on from {os.path.relpath(last)}", flush=True)
    return train(config, last, callbacks)


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what does not say what to train."""
    aside = ("sweep", "output_dir", "classes", "logger", "hydra")
    asked = {key: value for key, value in config.items() if key not in aside}
    return asked | {"data": {key: value for key, value in asked["data"].items() if key not in ("url", "root")}}


def check_sweep(config: DictConfig) -> None:
    """Refuse settings of a sweep that mean nothing."""
    check("sweep.stop_at_failure", config.sweep.stop_at_failure, bool)
    check("sweep.keep_checkpoints", config.sweep.keep_checkpoints, int | None)
    if (config.sweep.keep_checkpoints or 0) < 0:
        raise UserError(f"sweep.keep_checkpoints={config.sweep.keep_checkpoints}: give 0 or more, or null for all.")
    parallel.jobs_at_a_time(config.hydra.launcher)


def begin(config: DictConfig, folder: Path) -> None:
    """Write down what the sweep is, so that it can be gone on with."""
    stop_file(folder).unlink(missing_ok=True)
    files.write(folder / "multirun.yaml", OmegaConf.to_yaml(config))


def stop_file(folder: Path) -> Path:
    """Where a sweep has it, no other of its jobs begins."""
    return folder / "stop"


def refuse_blind_sweep(keys: Sequence[str], config: DictConfig) -> None:
    """Without validation images there is nothing to choose by: only seeds may be swept."""
    from cifarnet.build import make_data

    if (chosen := [key for key in keys if key != "seed"]) and not make_data(config).validates:
        raise UserError(
            f"Sweeping {', '.join(chosen)} with data.val_fraction=0 would leave only the test set to choose by. "
            "Set validation images aside, with data.val_fraction=0.1. (Sweeping seed alone is fine.)"
        )


def swept(folder: Path) -> list[str]:
    """The keys that a multirun varies, read from its own record."""
    _, task, params = _recorded(folder)
    keys = [
        override.key_or_group
        for override in OverridesParser.create().parse_overrides(task)
        if override.is_sweep_override()
    ]
    return [*keys, *params]


def _recorded(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """A multirun's own arguments: Hydra's, the others, and the keys that its sweeper's config varies."""
    record = read(folder / "multirun.yaml", yaml.safe_load)
    try:
        overrides, params = record["hydra"]["overrides"], record["hydra"]["sweeper"].get("params")
        return list(map(str, overrides["hydra"])), list(map(str, overrides["task"])), list(params or ())
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'multirun.yaml'} is no record of a sweep, or is damaged: {error}") from error


def _may_be_given(argument: str) -> bool:
    """Is it what a sweep's record may not bring along, or what lies elsewhere now?"""
    key = cli.key_of(argument)
    hydras = key.startswith(("hydra.", "hydra/")) and key not in ("hydra.sweep.dir", "hydra.mode")
    return hydras or key in ("classes", "data.root", "model.checkpoint") or replay.addresses(argument)


def resumed_sweep(arguments: Sequence[str]) -> list[str]:
    """The arguments of the multirun that `sweep.resume=<folder>` among these names, and its folder.

    Raises:
        UserError: there is no multirun in that folder, or other arguments are given too.
    """
    folder = Path(cli.value_of("sweep.resume", arguments) or ".")
    if not (folder / "multirun.yaml").is_file():
        raise UserError(f"sweep.resume={folder}: there is no sweep in that folder (multirun.yaml is missing).")
    files.refuse_links(folder)
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--multirun", "-m", action="store_true")
    flags.add_argument("--config-dir", "-cd")
    given, others = flags.parse_known_args(list(arguments))
    own = [argument for argument in others if _may_be_given(argument)]
    if unknown := [argument for argument in others if argument not in own and cli.key_of(argument) != "sweep.resume"]:
        raise UserError(f"sweep.resume={folder} repeats that sweep's own arguments: leave out {' '.join(unknown)}")
    hydra, task, _ = _recorded(folder)
    anew = {"hydra.mode", "hydra.sweep.dir", "hydra/help", "sweep.resume", "classes", *map(cli.key_of, own)}
    hydra = [line for line in hydra if cli.key_of(line) not in anew]
    if "hydra/launcher" in anew:
        hydra = [line for line in hydra if not line.startswith("hydra.launcher.")]
    task = [line for line in task if cli.key_of(line) not in anew]
    if left_out := [line for line in task if replay.addresses(line)]:
        print(printable(f"Not taken from the sweep: {', '.join(left_out)}. Give them in the command."), flush=True)
    task = [line for line in task if line not in left_out]
    allowing = [argument for argument in own if cli.key_of(argument) == "classes"]
    classes = locate(OverridesParser.create().parse_override(allowing[-1]).value()) if allowing else []
    replay.checked([*hydra, *task], folder / "multirun.yaml", classes)
    place = cli.literal(str(folder))
    configs = [] if given.config_dir is None else ["--config-dir", given.config_dir]
    return ["--multirun", *configs, *hydra, *task, *own, f"hydra.sweep.dir={place}", f"sweep.resume={place}"]
