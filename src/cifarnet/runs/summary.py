"""What a sweep has found: its table, `sweep.csv`, `sweep.png`, and which checkpoints it keeps."""

import csv
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from cifarnet.runs.tables import Group, Run, aligned, best_first, grouped, read_run, read_sweep, short, varied


def summarize(sweep_folder: Path) -> None:
    """Write `sweep.csv` and `sweep.png` into the sweep's folder and print the table."""
    runs = read_sweep(sweep_folder)
    if not runs:
        return
    groups = grouped(runs, "val_accuracy")
    write_csv(runs, sweep_folder / "sweep.csv")
    print(f"\n{table(groups)}\n")
    for run in runs:
        if run.status == "failed":
            print(f"  job {run.folder.name} failed: {run.note}")
    if keys := varied(groups):
        from cifarnet.runs import figures

        figures.save(figures.sweep(groups, keys), sweep_folder / "sweep.png")
    done, pruned = (sum(run.status == status for run in runs) for status in ("done", "pruned"))
    stopped = f", {pruned} pruned" if pruned else ""
    print(f"  {done} of {len(runs)} jobs done{stopped}: {os.path.relpath(sweep_folder)}/sweep.csv")
    if done + pruned < len(runs):
        print(f"  Run what is missing: python -m cifarnet.train sweep.resume={os.path.relpath(sweep_folder)}")


def table(groups: Sequence[Group]) -> str:
    """The groups as lines of text, the best first."""
    columns = {"val accuracy": [_score(group) for group in groups]}
    if any(len(group.runs) > 1 for group in groups):
        columns["n"] = [str(len(group.values)) for group in groups]
    columns |= {key: [short(group.settings.get(key, "")) for group in groups] for key in varied(groups)}
    seconds = [[run.metrics["seconds"] for run in group.runs if run.metrics] for group in groups]
    columns["seconds"] = [f"{statistics.mean(of):.1f}" if of else "" for of in seconds]
    columns["job"] = [",".join(run.folder.name for run in group.runs) for group in groups]
    return aligned(columns)


def _score(group: Group) -> str:
    mean = f"{group.mean:.2%}" if group.values else group.runs[0].status
    return mean + (f" ± {100 * group.deviation:.2f}" if len(group.values) > 1 else "")


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One row a job, the best first."""
    keys, temporary = varied(runs) or ["seed"], path.with_suffix(".tmp")
    columns = ["val_accuracy", "test_accuracy", *keys, "seconds", "status", "folder", "note"]
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for run in sorted(runs, key=lambda run: best_first(run.score)):
            measured = {key: run.metrics.get(key) for key in ("val_accuracy", "test_accuracy", "seconds")}
            told = {"status": run.status, "folder": run.folder.name, "note": run.note}
            writer.writerow(run.settings | measured | told)
    os.replace(temporary, path)


def clear_checkpoints(sweep_folder: Path, keep: int | None) -> None:
    """Remove the checkpoints of all finished jobs but the best `keep`; None keeps all."""
    if keep is None:
        return
    # the others were looked at before: the best of all are among these
    with_checkpoints = [read_run(path.parent) for path in sweep_folder.glob("*/checkpoints")]
    finished = sorted((run for run in with_checkpoints if run.metrics), key=lambda run: best_first(run.score))
    for run in finished[keep:]:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
