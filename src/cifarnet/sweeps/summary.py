"""The results of a sweep: its table, `sweep.csv` and `sweep.png`, and which checkpoints are kept."""

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cifarnet import cli
from cifarnet.errors import printable
from cifarnet.records.tables import Group, Run, column_table, grouped, read_run, read_sweep, shorten, sort_key, varied
from cifarnet.system import files


def summarize(sweep_folder: Path, jobs: int, command: str, trials: Mapping[str, Run] | None = None) -> None:
    """Print a sweep's table, and write `sweep.csv` and, unless it is a search, `sweep.png` into its folder.

    Args:
        jobs: number of jobs that the sweep should have.
        command: resumes the sweep.
        trials: the finished and running trials of a search, by their numbers; their folders may be on other machines.
    """
    runs, elsewhere = _all_runs(sweep_folder, trials or {})
    if not runs:
        return
    groups = grouped(runs, "val_accuracy")
    write_csv(runs, sweep_folder / "sweep.csv")
    print(printable(f"\n{table(groups)}\n"))
    for run in runs:
        if run.note and run.status != "pruned":
            print(printable(f"  job {run.folder.name}{' failed' if run.status == 'failed' else ''}: {run.note}"))
    is_search = trials is not None
    if (keys := varied(groups)) and not is_search:
        from cifarnet.records import figures

        figures.save(figures.sweep(groups, keys), sweep_folder / "sweep.png")
    count = Counter(run.status for run in runs)
    count["elsewhere"] = sum(run.status != "running" for run in elsewhere)
    others = [f", {count[status]} {status}" for status in ("pruned", "failed", "running", "elsewhere") if count[status]]
    jobs = max(jobs, len(runs))
    print(f"  {count['done']} of {jobs} jobs done{''.join(others)}: {os.path.relpath(sweep_folder)}/sweep.csv")
    ended = {run.folder.name for run in runs if run.status not in ("cut off", "damaged")}
    if not is_search and (missing := [number for number in range(jobs) if str(number) not in ended]):
        print(f"  Not finished: {_ranges(missing)}")
    # a search tries other settings instead of repeating a failed trial
    if count["done"] + count["pruned"] + count["running"] + is_search * count["failed"] < jobs:
        print(f"  Run the missing jobs: {command}")


def _all_runs(sweep_folder: Path, trials: Mapping[str, Run]) -> tuple[list[Run], list[Run]]:
    """Return all runs of a sweep, and those of them that only the study of a search knows."""
    runs, elsewhere = [], dict(trials)
    for run in read_sweep(sweep_folder):
        trial = trials.get(run.folder.name, run)
        if run.status in ("cut off", "failed") and trial.status != run.status:
            continue  # the trial was repeated on another machine
        elsewhere.pop(run.folder.name, None)
        is_running = run.status == "cut off" and files.is_locked(run.folder / ".lock")
        runs.append(replace(run, status="running") if is_running else run)
    return [*runs, *elsewhere.values()], list(elsewhere.values())


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: 1, 3-5."""
    ranges: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        ranges.setdefault(number - index, []).append(number)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ranges.values())


def resume_command(sweep_folder: Path) -> str:
    """The command that resumes a sweep."""
    return f"python -m cifarnet.train {cli.quoted('sweep.resume', os.path.relpath(sweep_folder))}"


def table(groups: Sequence[Group]) -> str:
    """The groups as a table, in their order."""
    columns = {"val accuracy": [_mean(group) or group.runs[0].status for group in groups]}
    columns["test accuracy"] = [_mean(replace(group, metric="test_accuracy")) for group in groups]
    if any(len(group.runs) > 1 for group in groups):
        columns["n"] = [str(len(group.values)) for group in groups]
    columns |= {key: [shorten(group.settings.get(key, "")) for group in groups] for key in varied(groups)}
    seconds = [replace(group, metric="seconds") for group in groups]
    columns["seconds"] = [f"{group.mean:.1f}" if group.values else "" for group in seconds]
    columns["job"] = [",".join(run.folder.name for run in group.runs) for group in groups]
    return column_table(columns)


def _mean(group: Group) -> str:
    """The mean of accuracies, with their deviation if there are several; empty if there are none."""
    mean = f"{group.mean:.2%}" if group.values else ""
    return mean + (f" ± {100 * group.deviation:.2f}" if len(group.values) > 1 else "")


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write a row for each job, the best first."""
    keys, content = varied(runs) or ["seed"], io.StringIO(newline="")
    columns = ["val_accuracy", "test_accuracy", *keys, "seconds", "status", "folder", "note"]
    writer = csv.DictWriter(content, columns, extrasaction="ignore")
    writer.writeheader()
    for run in sorted(runs, key=lambda run: sort_key(run.score)):
        folder = run.folder.name if run.folder.parent == path.parent else run.folder
        outcome = {"status": run.status, "folder": folder, "note": run.note}
        writer.writerow(run.settings | run.numbers | outcome)
    files.write(path, content.getvalue().encode("utf-8", errors="replace"))


def clear_checkpoints(sweep_folder: Path, keep: int | None) -> None:
    """Remove the checkpoints of all finished jobs except the best `keep`; None keeps all."""
    if keep is None:
        return
    runs = [read_run(path.parent) for path in sweep_folder.glob("*/checkpoints")]
    finished = sorted((run for run in runs if run.status == "done"), key=lambda run: sort_key(run.score))
    for run in finished[keep:]:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
