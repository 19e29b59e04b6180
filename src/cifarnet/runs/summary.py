"""What a sweep has found: its table, `sweep.csv`, `sweep.png`, and which checkpoints it keeps."""

import csv
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from cifarnet.runs.tables import Group, Run, best_first, columns, grouped, read_run, read_sweep, short, varied


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
            print(f"  job {run.folder.name} failed: {run.error}")
    if keys := varied(groups):
        from cifarnet.runs import figures

        figure = figures.sweep([(group.settings, group.mean, group.deviation) for group in groups], keys)
        figures.save(figure, sweep_folder / "sweep.png")
    done, pruned = (sum(run.status == status for run in runs) for status in ("done", "pruned"))
    stopped, place = f", {pruned} pruned" if pruned else "", os.path.relpath(sweep_folder)
    print(f"  {done} of {len(runs)} jobs done{stopped}: {place}/sweep.csv")
    if done + pruned < len(runs):
        print(f"  Run what is missing: python -m cifarnet.train sweep.resume={place}")


def table(groups: Sequence[Group]) -> str:
    """The groups as lines of text, the best first."""
    keys = varied(groups)
    replicas = any(len(group.runs) > 1 for group in groups)
    rows = [["val accuracy", *(["n"] if replicas else []), *keys, "seconds", "job"]]
    for group in groups:
        score = f"{group.mean:.2%}" if group.values else group.runs[0].status
        if len(group.values) > 1:
            score += f" ± {100 * group.deviation:.2f}"
        seconds = [run.metrics["seconds"] for run in group.runs if run.metrics]
        count = [str(len(group.values))] if replicas else []
        settings = [short(group.settings.get(key, "")) for key in keys]
        mean_seconds = f"{statistics.mean(seconds):.1f}" if seconds else ""
        rows.append([score, *count, *settings, mean_seconds, ",".join(run.folder.name for run in group.runs)])
    return "\n".join(columns(rows))


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One row a job, the best first."""
    keys = varied(runs) or ["seed"]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["val_accuracy", "test_accuracy", *keys, "seconds", "status", "folder", "note"])
        for run in sorted(runs, key=lambda run: best_first(run.score)):
            val, test, seconds = (run.metrics.get(key, "") for key in ("val_accuracy", "test_accuracy", "seconds"))
            settings = [run.settings.get(key, "") for key in keys]
            writer.writerow([val, test, *settings, seconds, run.status, run.folder.name, run.error or run.pruned])
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
