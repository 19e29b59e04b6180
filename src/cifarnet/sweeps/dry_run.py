"""A dry run of a sweep: its jobs, their settings, and an estimate of their durations from records of matching runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from cifarnet.config import deciding_settings
from cifarnet.errors import UserError, printable
from cifarnet.records.record import Record
from cifarnet.records.tables import Run, column_table, differences, number, read_run

RECORDS = Path("lightning_logs")  # the folder of all runs
Settings = frozenset[tuple[str, str]]  # those that affect a run's result or duration, except for the seed


def report(
    loader: ConfigLoader, config: DictConfig, job_overrides: Sequence[Sequence[str]], folder: Path, num_workers: int
) -> None:
    """Print the jobs of a sweep, their settings and an estimate of their durations.

    Args:
        config: the config of the sweep.
        job_overrides: the overrides of each job.
        folder: the folder of the sweep; the finished jobs of a resumed sweep do not run again.
        num_workers: the number of jobs that run at a time.
    """
    records = _records(RECORDS, folder)
    found: dict[frozenset[str], list[Record]] = {}
    jobs: list[Run] = []
    for place, overrides in enumerate(job_overrides):
        pairs = (line.partition("=") for line in overrides if not line.startswith(("hydra.", "sweep.")))
        is_done = config.sweep.resume is not None and read_run(folder / str(place)).status == "done"
        job = Run(folder / str(place), {key: value for key, _, value in pairs}, "done" if is_done else "unknown")
        jobs.append(job)
        fixed = frozenset(line for line in overrides if not line.startswith("seed="))
        if records and fixed not in found:  # composing a config takes a tenth of a second
            found[fixed] = records.get(_settings(loader.load_sweep_config(config, list(overrides))), [])
        if not is_done and (matching := found.get(fixed)):
            seconds = [run.fit_seconds + run.compile_seconds + run.seconds + run.test_seconds for run in matching]
            job.numbers = {"seconds": statistics.mean(seconds), "n": len(matching)}
    varied = differences(jobs)
    columns = {"job": [job.folder.name for job in jobs], **varied}
    columns["seconds"] = [number(job.numbers["seconds"], "seconds") if job.numbers else job.status for job in jobs]
    columns["matching runs"] = [str(job.numbers.get("n", "")) for job in jobs]
    print(printable(f"\n{column_table(columns)}\n"))
    print(printable(f"  All jobs: {' '.join(f'{k}={v}' for k, v in jobs[0].settings.items() if k not in varied)}"))
    if known := [job.numbers["seconds"] for job in jobs if job.numbers]:
        machines = {str(record.hardware.get("name")) for matching in found.values() for record in matching}
        total = f"{number(sum(known), 'seconds')} s of training and testing for {len(known)} of {len(jobs)} jobs"
        print(printable(f"  Estimate: {total}, from matching runs on {', '.join(sorted(machines))}."))
        print(f"  {num_workers} jobs run at a time.\n" if num_workers > 1 else "", end="")
    if unknown := [job.folder.name for job in jobs if not job.numbers and job.status == "unknown"]:
        which = "any job" if len(unknown) == len(jobs) else f"job{'s' * (len(unknown) > 1)} {', '.join(unknown)}"
        print(f"  No estimate for {which}: {RECORDS} contains no run with the same settings (with any seed).")
    print("  Nothing was run. To run the jobs, remove hydra.sweeper.dry_run.")


def _records(*folders: Path) -> dict[Settings, list[Record]]:
    """Read the records of all runs in folders, except for those that cannot be read."""
    records: dict[Settings, list[Record]] = {}
    for path in sorted({path.resolve() for folder in folders for path in folder.rglob("metrics.json")}):
        try:
            record = Record.read(path)
        except UserError:  # such as the metrics of an evaluation
            continue
        records.setdefault(_settings(record.config), []).append(record)
    return records


def _settings(config: Any) -> Settings:
    """Return the settings that matching runs share. A composed config is completed as a run completes it."""
    if OmegaConf.is_config(config):
        from cifarnet.finetuning import expand  # imports torch

        config = OmegaConf.to_container(expand(config))
    ours = {key: value for key, value in config.items() if key not in ("hydra", "seed")}
    return frozenset(deciding_settings(ours, times=True).items())
