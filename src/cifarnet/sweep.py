"""Sweeps: what a job of a multirun does beside training, and the summary of all jobs.

A multirun has one folder. Each job's own folder in it, named by its number, holds Hydra's record of its overrides and,
in the end, `metrics.json` or `error.txt`. All that is below reads these files, so that it works just as well for a
sweep that failed, was killed, or ran in several processes.
"""

import contextlib
import csv
import functools
import getpass
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.errors import Pruned, UserError


@dataclass
class Job:
    """One job of a multirun. `settings` are its overrides, `metrics` its `metrics.json`, `error` its `error.txt`;
    `pruned` says where a search stopped it."""

    folder: Path
    settings: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    pruned: str = ""

    @property
    def status(self) -> str:
        return "done" if self.metrics else "failed" if self.error else "pruned" if self.pruned else "cut off"

    @property
    def score(self) -> float:
        """Validation accuracy, from 0 to 1; NaN where there is none."""
        score = self.metrics.get("val_accuracy")
        return math.nan if score is None else score


@dataclass
class Group:
    """Jobs that differ only by seed."""

    settings: dict[str, str]
    jobs: list[Job]

    @property
    def scores(self) -> list[float]:
        return [job.score for job in self.jobs if math.isfinite(job.score)]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan


def is_job() -> bool:
    """Is this a job of a multirun?"""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run(config: DictConfig, train: Callable[[DictConfig], float]) -> float:
    """Train as a job of a multirun: refuse what cannot be compared, keep errors, clear away checkpoints.

    With `sweep.resume`, a job that is done returns its score, and one that was cut off goes on.
    """
    folder = Path(config.output_dir)
    if config.data.get("val_fraction") == 0:
        refuse_blind_sweep(swept(folder.parent))
    (folder / "error.txt").unlink(missing_ok=True)
    if config.sweep.resume is not None:
        done = read(folder)
        if done.metrics and own(done.metrics["overrides"]) == own(HydraConfig.get().overrides.task):
            print(f"Job {folder.name} is done: {done.score:.2%}", flush=True)
            return done.score
        if (last := folder / "checkpoints" / "last.ckpt").is_file():
            print(f"Job {folder.name} goes on from {os.path.relpath(last)}", flush=True)
            config.ckpt_path = str(last)
    if config.threads is None:
        config.threads = threads_a_job()
    if jobs_at_a_time() != 1:
        end_with_parent()
        if config.trainer.accelerator != "cpu":
            claim_gpu()
    try:
        score = train(config)
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


def own(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what to train."""
    return [override for override in overrides if not override.startswith("sweep.")]


def jobs_at_a_time() -> int:
    """How many the launcher runs side by side."""
    jobs = HydraConfig.get().launcher.get("n_jobs", 1)
    return jobs if jobs > 0 else os.cpu_count() or 1  # joblib's -1 is one a core


def threads_a_job() -> int | None:
    """The cores divided by the jobs that run at a time; None, all, for one at a time."""
    jobs = jobs_at_a_time()
    return None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


@functools.cache  # once for all jobs of this process
def end_with_parent() -> None:
    """A sweep that was killed leaves no job at work behind, whose folder another sweep may go on with."""
    import psutil

    parent = psutil.Process(os.getppid())

    def watch() -> None:
        parent.wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache  # `claim_gpu` changes what can be seen
def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:  # not by torch, which takes seconds to import
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(index) for index, _ in enumerate(listed.splitlines())]


def default_jobs() -> int:
    """One a GPU; two where there is none. Configs know it as `default_jobs`."""
    return len(gpus()) or 2


OmegaConf.register_new_resolver("default_jobs", default_jobs, replace=True)


@functools.cache  # once for all jobs of this process
def claim_gpu() -> FileLock | None:
    """Let this process see one GPU alone, which no other job has; more processes than GPUs share them evenly.

    The lock is held as long as the process lives, however it ends.
    """
    folder = Path(tempfile.gettempdir(), f"cifarnet-{getpass.getuser()}")
    for turn in range(1000 if gpus() else 0):
        for name in gpus():
            folder.mkdir(exist_ok=True)
            lock = FileLock(folder / f"gpu-{name}-{turn}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(blocking=False)
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return lock
    return None


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


def read(folder: Path) -> Job:
    """What there is to know about a job."""
    overrides = folder / ".hydra" / "overrides.yaml"
    lines = [str(line) for line in OmegaConf.load(overrides)] if overrides.is_file() else []
    settings = {key: value for key, _, value in (line.partition("=") for line in own(lines))}
    job = Job(folder, settings)
    if (metrics := folder / "metrics.json").is_file():
        job.metrics = json.loads(metrics.read_text(encoding="utf-8"))
    for note in ("error", "pruned"):
        if (file := folder / f"{note}.txt").is_file():
            setattr(job, note, file.read_text(encoding="utf-8").strip())
    return job


def read_all(sweep_folder: Path) -> list[Job]:
    """All jobs of a multirun that were begun, in order."""
    numbered = [path.parent for path in sweep_folder.glob("*/.hydra") if path.parent.name.isdigit()]
    return [read(path) for path in sorted(numbered, key=lambda path: int(path.name))]


def _best_first(score: float) -> float:
    """The key to sort by: the highest score first, NaN last."""
    return -score if math.isfinite(score) else math.inf


def clear_checkpoints(sweep_folder: Path, keep: int | None) -> None:
    """Remove the checkpoints of all finished jobs but the best `keep`; None keeps all."""
    if keep is None:
        return
    # the others were looked at before: the best of all are among these
    with_checkpoints = [read(path.parent) for path in sweep_folder.glob("*/checkpoints")]
    finished = sorted((job for job in with_checkpoints if job.metrics), key=lambda job: _best_first(job.score))
    for job in finished[keep:]:
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def grouped(jobs: Sequence[Job]) -> list[Group]:
    """Jobs that differ only by seed together, the best mean first, those without a score last."""
    groups: dict[tuple, Group] = {}
    for job in jobs:
        settings = {key: value for key, value in job.settings.items() if key != "seed"}
        groups.setdefault(tuple(sorted(settings.items())), Group(settings, [])).jobs.append(job)
    return sorted(groups.values(), key=lambda group: _best_first(group.mean))


def varied(groups: Sequence[Job | Group]) -> list[str]:
    """The settings that are not the same in all jobs or groups."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    return [key for key in keys if len({group.settings.get(key) for group in groups}) > 1]


def table(groups: Sequence[Group]) -> str:
    """The groups as lines of text, the best first."""
    from cifarnet.report import short

    keys = varied(groups)
    replicas = any(len(group.jobs) > 1 for group in groups)
    rows = [["val accuracy", *(["n"] if replicas else []), *keys, "seconds", "job"]]
    for group in groups:
        score = f"{group.mean:.2%}" if group.scores else group.jobs[0].status
        if len(group.scores) > 1:
            score += f" ± {100 * group.deviation:.2f}"
        seconds = [job.metrics["seconds"] for job in group.jobs if job.metrics]
        rows.append(
            [
                score,
                *([str(len(group.scores))] if replicas else []),
                *(short(group.settings.get(key, "")) for key in keys),
                f"{statistics.mean(seconds):.1f}" if seconds else "",
                ",".join(job.folder.name for job in group.jobs),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def write_csv(jobs: Sequence[Job], path: Path) -> None:
    """One row a job, the best first."""
    keys = varied(jobs) or ["seed"]
    ordered = sorted(jobs, key=lambda job: _best_first(job.score))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["val_accuracy", "test_accuracy", *keys, "seconds", "status", "folder", "note"])
        for job in ordered:
            numbers = [job.metrics.get(key, "") for key in ("val_accuracy", "test_accuracy")]
            settings = [job.settings.get(key, "") for key in keys]
            seconds, note = job.metrics.get("seconds", ""), job.error or job.pruned
            writer.writerow([*numbers, *settings, seconds, job.status, job.folder.name, note])
    os.replace(temporary, path)


def summarize(sweep_folder: Path) -> None:
    """Write `sweep.csv` and `sweep.png` into the multirun's folder and print the table."""
    jobs = read_all(sweep_folder)
    if not jobs:
        return
    groups = grouped(jobs)
    write_csv(jobs, sweep_folder / "sweep.csv")
    print(f"\n{table(groups)}\n")
    for job in jobs:
        if job.status == "failed":
            print(f"  job {job.folder.name} failed: {job.error}")
    if keys := varied(groups):
        from cifarnet import report

        figure = report.sweep([(group.settings, group.mean, group.deviation) for group in groups], keys)
        figure.savefig(sweep_folder / "sweep.png")
    done, pruned = (sum(job.status == status for job in jobs) for status in ("done", "pruned"))
    stopped = f", {pruned} pruned" if pruned else ""
    print(f"  {done} of {len(jobs)} jobs done{stopped}: {os.path.relpath(sweep_folder)}/sweep.csv")
    if done + pruned < len(jobs):
        print(f"  Run what is missing: python -m cifarnet.train sweep.resume={os.path.relpath(sweep_folder)}")


class Folder(Callback):
    """Remembers, in the process that runs a multirun, which folder it has."""

    path: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Folder.path = Path(config.hydra.sweep.dir)


def with_resumed_sweep(arguments: Sequence[str]) -> list[str]:
    """With `sweep.resume=<folder>`, the arguments of that multirun, and its folder.

    Raises:
        UserError: there is no multirun in that folder, or other arguments are given too.
    """
    resume = [argument for argument in arguments if argument.startswith("sweep.resume=")]
    if not resume:
        return list(arguments)
    folder = Path(resume[0].partition("=")[2].strip("'\""))
    record = folder / "multirun.yaml"
    if not record.is_file():
        raise UserError(f"{resume[0]}: there is no multirun in that folder ({record} is missing).")
    if others := [argument for argument in arguments if argument not in (*resume, "-m", "--multirun")]:
        raise UserError(f"{resume[0]} repeats that multirun's own arguments: leave out {' '.join(others)}")
    saved = OmegaConf.load(record).hydra.overrides
    hydra = [line for line in saved.hydra if not line.startswith(("hydra.mode", "hydra.sweep.dir"))]
    task = [line for line in saved.task if not line.startswith("sweep.resume=")]
    return ["--multirun", *hydra, *task, f"hydra.sweep.dir='{folder}'", f"sweep.resume='{folder}'"]
