"""What a sweep has found: its table, `sweep.csv`, `sweep.png`, and which checkpoints it keeps."""

import csv
import io
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifarnet import cli
from cifarnet.errors import printable
from cifarnet.records.tables import Group, Run, aligned, best_first, grouped, read_run, read_sweep, short, varied
from cifarnet.system import files


def summarize(sweep_folder: Path, jobs: int, command: str, trials: Mapping[str, Run] | None = None) -> None:
    """Write `sweep.csv`, and but for a search `sweep.png`, into the sweep's folder and print the table.

    Args:
        jobs: how many the sweep is to have.
        command: goes on with it.
        trials: of a search, those that are finished or running, whose folders may lie on other machines.
    """
    search, elsewhere = trials is not None, dict(trials or {})
    runs = [
        run
        for run in read_sweep(sweep_folder)
        if run.status not in ("cut off", "failed") or elsewhere.get(run.folder.name, run).status == run.status
    ]
    for run in runs:
        elsewhere.pop(run.folder.name, None)
        if run.status == "cut off" and files.is_locked(run.folder / ".lock"):
            run.status = "running"
    runs += elsewhere.values()
    if not runs:
        return
    groups = grouped(runs, "val_accuracy")
    write_csv(runs, sweep_folder / "sweep.csv")
    print(printable(f"\n{table(groups)}\n"))
    for run in runs:
        if run.note and run.status != "pruned":
            print(printable(f"  job {run.folder.name}{' failed' if run.status == 'failed' else ''}: {run.note}"))
    if (keys := varied(groups)) and not search:
        from cifarnet.records import figures

        figures.save(figures.sweep(groups, keys), sweep_folder / "sweep.png")
    count = Counter(run.status for run in runs)
    count["elsewhere"] = sum(run.status != "running" for run in elsewhere.values())
    others = ("pruned", "failed", "running", "elsewhere")
    jobs, counts = max(jobs, len(runs)), "".join(f", {count[what]} {what}" for what in others if count[what])
    print(f"  {count['done']} of {jobs} jobs done{counts}: {os.path.relpath(sweep_folder)}/sweep.csv")
    ended = {run.folder.name for run in runs if run.status not in ("cut off", "damaged")}
    if not search and (missing := [number for number in range(jobs) if str(number) not in ended]):
        print(f"  Cut off, or not begun: {_ranges(missing)}")
    # where one failed, a search tries other settings instead
    if count["done"] + count["pruned"] + count["running"] + search * count["failed"] < jobs:
        print(f"  Run what is missing: {command}")


def _ranges(numbers: Sequence[int]) -> str:
    """As people write them: 1, 3-5."""
    together: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        together.setdefault(number - place, []).append(number)
    return ", ".join(f"{of[0]}-{of[-1]}" if len(of) > 1 else f"{of[0]}" for of in together.values())


def resuming(sweep_folder: Path) -> str:
    """The command that goes on with a sweep."""
    return f"python -m cifarnet.train {cli.quoted('sweep.resume', os.path.relpath(sweep_folder))}"


def table(groups: Sequence[Group]) -> str:
    """The groups as lines of text, the best first."""
    tests = [Group(group.settings, group.runs, "test_accuracy") for group in groups]
    columns = {"val accuracy": [_mean(group) or group.runs[0].status for group in groups]}
    columns["test accuracy"] = [_mean(group) for group in tests]
    if any(len(group.runs) > 1 for group in groups):
        columns["n"] = [str(len(group.values)) for group in groups]
    columns |= {key: [short(group.settings.get(key, "")) for group in groups] for key in varied(groups)}
    seconds = [Group(group.settings, group.runs, "seconds") for group in groups]
    columns["seconds"] = [f"{group.mean:.1f}" if group.values else "" for group in seconds]
    columns["job"] = [",".join(run.folder.name for run in group.runs) for group in groups]
    return aligned(columns)


def _mean(group: Group) -> str:
    """Of accuracies; empty where there are none."""
    mean = f"{group.mean:.2%}" if group.values else ""
    return mean + (f" ± {100 * group.deviation:.2f}" if len(group.values) > 1 else "")


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One row a job, the best first."""
    keys, content = varied(runs) or ["seed"], io.StringIO(newline="")
    columns = ["val_accuracy", "test_accuracy", *keys, "seconds", "status", "folder", "note"]
    writer = csv.DictWriter(content, columns, extrasaction="ignore")
    writer.writeheader()
    for run in sorted(runs, key=lambda run: best_first(run.score)):
        values = {key: run.value(key) for key in ("val_accuracy", "test_accuracy", "seconds")}
        measured = {key: value if math.isfinite(value) else "" for key, value in values.items()}
        folder = run.folder.name if run.folder.parent == path.parent else run.folder
        told = {"status": run.status, "folder": folder, "note": run.note}
        writer.writerow(run.settings | measured | told)
    files.write(path, content.getvalue().encode("utf-8", errors="replace"))


def clear_checkpoints(sweep_folder: Path, keep: int | None) -> None:
    """Remove the checkpoints of all finished jobs but the best `keep`; None keeps all."""
    if keep is None:
        return
    # the others were looked at before: the best of all are among these
    with_checkpoints = [read_run(path.parent) for path in sweep_folder.glob("*/checkpoints")]
    finished = sorted((run for run in with_checkpoints if run.metrics), key=lambda run: best_first(run.score))
    for run in finished[keep:]:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
