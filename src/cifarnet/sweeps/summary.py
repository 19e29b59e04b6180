"""The results of a sweep: its table, `sweep.csv`, `sweep.png`, and the checkpoints to keep."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cifarnet import cli
from cifarnet.errors import printable
from cifarnet.records import tables
from cifarnet.records.tables import Group, Run
from cifarnet.system import files


def summarize(sweep_folder: Path, jobs: int, command: str, trials: Mapping[str, Run] | None = None) -> None:
    """Print a sweep's table, and write `sweep.csv` and, unless the sweep is a search or has no result, `sweep.png`.

    Args:
        jobs: the number of jobs that the sweep should have.
        command: the command that resumes the sweep.
        trials: the finished and running trials of a search, by number; their folders may be on other machines.
    """
    runs = _all_runs(sweep_folder, trials or {})
    if not runs:
        return
    groups = tables.grouped(runs, "val_accuracy")
    for number, group in enumerate(groups):
        group.label = tables.letter(number)
    print(printable(f"\n{table(groups)}\n"))
    is_search = trials is not None
    if (compared := [group for group in groups if len(group.by_fold) > 1 and not is_search])[1:]:
        from cifarnet.records import comparison  # scipy takes a second to import

        print(printable("\n".join(f"  {line}" for line in comparison.conclusions(compared))), end="\n\n")
    write_csv(runs, sweep_folder / "sweep.csv")
    for run in runs:
        if run.note and run.status != "pruned":
            print(printable(f"  job {run.folder.name}{' failed' if run.status == 'failed' else ''}: {run.note}"))
    if (keys := tables.varied(groups)) and groups[0].values and not is_search:
        from cifarnet.records import figures

        figures.save(figures.sweep(groups, keys), sweep_folder / "sweep.png")
    count = Counter(run.status for run in runs)
    count["elsewhere"] = sum(run.folder.parent != sweep_folder and run.status != "running" for run in runs)
    others = [f", {count[status]} {status}" for status in ("pruned", "failed", "running", "elsewhere") if count[status]]
    jobs = max(jobs, len(runs))
    print(f"  {count['done']} of {jobs} jobs done{''.join(others)}: {os.path.relpath(sweep_folder)}/sweep.csv")
    ended = {run.folder.name for run in runs if run.status not in ("cut off", "damaged")}
    if not is_search and (missing := [number for number in range(jobs) if str(number) not in ended]):
        print(f"  Not finished: {', '.join(map(str, missing))}")
    # a search does not repeat failed trials, but tries other settings
    if count["done"] + count["pruned"] + count["running"] + is_search * count["failed"] < jobs:
        print(f"  Run the missing jobs: {command}")


def _all_runs(sweep_folder: Path, trials: Mapping[str, Run]) -> list[Run]:
    """Return all runs of a sweep, including those that are only in the study of a search."""
    runs = dict(trials)
    for run in tables.read_sweep(sweep_folder):
        if run.status in ("cut off", "failed") and runs.get(run.folder.name, run).status != run.status:
            continue  # the trial was repeated on another machine
        is_running = run.status == "cut off" and files.is_locked(run.folder / ".lock")
        runs[run.folder.name] = replace(run, status="running") if is_running else run
    return list(runs.values())


def resume_command(sweep_folder: Path) -> str:
    """Return the command that resumes a sweep."""
    return f"python -m cifarnet.train {cli.quoted('sweep.resume', os.path.relpath(sweep_folder))}"


def table(groups: Sequence[Group]) -> str:
    """Return a table of the groups, in the given order."""
    columns = {"": [group.label for group in groups]} if any(len(group.by_fold) > 1 for group in groups) else {}
    columns |= {"val accuracy": [group.result() or group.runs[0].status for group in groups]}
    for metric in ("test_accuracy", "seconds"):
        columns[metric.replace("_", " ")] = [replace(group, metric=metric).result() for group in groups]
    if any(len(group.runs) > 1 for group in groups):
        columns["n"] = [str(len(group.values)) for group in groups]
    columns |= tables.differences(groups)
    columns["job"] = [",".join(run.folder.name for run in group.runs) for group in groups]
    return tables.column_table(columns)


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write a row for each job, sorted by validation accuracy, best first."""
    columns, rows = ["val_accuracy", "test_accuracy", *(tables.varied(runs) or ["seed"])], []
    for run in sorted(runs, key=lambda run: tables.sort_key(run.score)):
        folder = run.folder.name if run.folder.parent == path.parent else run.folder
        rows.append(run.settings | run.numbers | {"status": run.status, "folder": folder, "note": run.note})
    files.write(path, tables.csv_text(rows, [*columns, "seconds", "status", "folder", "note"]))


def clear_checkpoints(sweep_folder: Path, keep: int | None) -> None:
    """Remove the checkpoints of all finished jobs except the best `keep`; None keeps all."""
    if keep is None:
        return
    runs = [tables.read_run(path.parent) for path in sweep_folder.glob("*/checkpoints")]
    finished = sorted((run for run in runs if run.status == "done"), key=lambda run: tables.sort_key(run.score))
    for run in finished[keep:]:
        files.remove_checkpoints(run.folder)
