"""Comparison of groups of runs: their differences, the significance of these, and warnings."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifarnet.config import deciding_settings, flat
from cifarnet.errors import UserError
from cifarnet.records.record import NUMBERS, Record
from cifarnet.records.significance import LEVEL, MOST_SEEDS, POWER, holm, seeds_needed, welch
from cifarnet.records.tables import Group, Run, column_table, differences, grouped, is_time, number, sort_key, unit


def load(paths: Sequence[str], against: Sequence[str], metric: str | None) -> tuple[list[Group], list[str]]:
    """Read and group the runs at or below `paths`, and then those of the baseline, `against`.

    Args:
        metric: the name of a number in `metrics.json`; None: val_accuracy, or test_accuracy if a run has no
            val_accuracy.

    Returns:
        The groups, and a message for each run that is left out.

    Raises:
        UserError: there is nothing to compare.
    """
    baseline = _files(against)
    compared = [file for file in _files(paths) if file not in baseline]
    records: dict[Path, Record] = {}
    left_out = []
    for file in [*compared, *baseline]:
        try:
            records[file] = _read(file, metric)
        except UserError as error:
            left_out.append(f"Left out: {error}")
    if metric is None:
        is_validated = all(math.isfinite(record.val_accuracy) for record in records.values())
        metric = "val_accuracy" if is_validated else "test_accuracy"
    groups: list[Group] = []
    for files in [compared, baseline] if against else [compared]:
        runs = []
        for file in filter(records.get, files):
            record = records[file]
            runs.append(Run(file.parent, _settings(record, metric), record=record, numbers=record.numbers()))
        if not runs:
            hint = f"Choose other runs or another metric ({', '.join(NUMBERS)})."
            note = "Runs in the folders of --against serve only as the baseline."
            raise UserError(" ".join(["No run can be compared.", *left_out, hint, note]))
        for group in grouped(runs, metric):
            group.is_baseline = files is baseline
            group.label = letter(len(groups))
            names = dict.fromkeys(record.name for record in group.records)
            group.name = " / ".join(names) + (" (baseline)" if group.is_baseline else "")
            groups.append(group)
    return groups, left_out


def _read(file: Path, metric: str | None) -> Record:
    """Read the record of a run. Raise a UserError if the run cannot be compared."""
    record = Record.read(file)
    if record.partial:
        raise UserError(f"{file.parent} is a partial run ({record.partial}).")
    if metric and metric not in record.numbers():
        raise UserError(f"{file.parent} has no {metric}.")
    return record


def _files(paths: Sequence[str]) -> list[Path]:
    """Return the `metrics.json` of all runs at or below the paths, without those of evaluations (beside a report)."""
    files = []
    for path in paths:
        found = [Path(path)] if os.path.isfile(path) else sorted(Path(path).rglob("metrics.json"))
        found = [file for file in found if not file.with_name("report.html").exists()]
        if not found:
            problem = "contains no finished run" if os.path.exists(path) else "does not exist"
            raise UserError(f"{path} {problem}. Specify the folder of a run or of several runs, or a metrics.json.")
        files += [Path(os.path.relpath(os.path.realpath(file))) for file in found]
    return list(dict.fromkeys(files))


def _settings(record: Record, metric: str) -> dict[str, str]:
    """Return the settings that affect a metric, with the precision that was used instead of `auto`, and the images."""
    precisions = dict.fromkeys(session["precision"] for session in record.sessions)
    settings = deciding_settings(record.config, times=is_time(metric))
    return settings | {"trainer.precision": " / ".join(precisions)} | flat(_images(record))


def _images(record: Record) -> dict[str, Any]:
    """Return the number of images and their checksum. Streamed images have no checksum but a location."""
    data = record.data
    checksum = data["sha256"][:8] if data["sha256"] else flat(record.resolved).get("data.root")
    return {"images": data | {"sha256": checksum}}


def letter(number: int) -> str:
    """Return the label of a group: a to z, then aa, ab, …"""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def table(groups: Sequence[Group]) -> str:
    """Return a table of the groups. Up to four settings that differ are columns; more are listed below the table."""
    columns = {"": [group.label for group in groups], " ": [group.name for group in groups]}
    columns[groups[0].metric.replace("_", " ")] = [group.result() for group in groups]
    columns["n"] = [str(len(group.values)) for group in groups]
    differing, below = differences(groups), []
    if len(differing) <= 4:
        columns |= differing
    else:
        below = ["", f"  different in {' / '.join(columns[''])}:"]
        below += [f"    {key}: {' / '.join(values)}" for key, values in differing.items()]
    folders = [os.path.commonpath([run.folder for run in group.counted]) or "." for group in groups]
    if len(set(folders)) > 1:
        columns["folder"] = folders
    return "\n".join([column_table(columns), *below])


def conclusions(groups: Sequence[Group]) -> list[str]:
    """Compare each group with each baseline or, if there are no baselines, the best group with each other group."""
    others, baselines = ([group for group in groups if group.is_baseline == side] for side in (False, True))
    pairs = [(first, second) for second in baselines for first in others]
    pairs = pairs or [(groups[0], second) for second in groups[1:]]
    if not pairs:
        return ["There is only one group, so there is nothing to compare. Add runs, or use --against."]
    corrected = holm([welch(first.values, second.values)[2] for first, second in pairs])
    num_tested = sum(map(math.isfinite, corrected))
    lines = []
    for (first, second), p in zip(pairs, corrected, strict=True):
        lines += _conclusion(first, second, p, num_tested)
    if num_tested:
        correction = f", corrected for {num_tested} comparisons by Holm's method; the intervals are not corrected"
        lines.append(f"p: Welch's t-test, two-sided{correction if num_tested > 1 else ''}.")
    if len(others) > 1 and len(pairs) > 1:
        lines.append(
            f"{groups[0].label} was chosen as the best of {len(others)} groups from these same results, which makes it "
            "look better than it is. Repeat the comparison with new seeds."
        )
    return lines


def _conclusion(first: Group, second: Group, p: float, num_tested: int) -> list[str]:
    """Return the difference of two groups, its interval and p-value, and the number of seeds needed to detect it."""
    metric, difference = first.metric, first.mean - second.mean
    images = min((group.images for group in (first, second) if group.images), default=None)
    points = f"{number(difference, metric, '+', images)}{unit(metric).replace('%', ' points')}"
    line = f"{first.label} - {second.label}: {points}"
    if math.isnan(p):
        return [f"{line}; no interval: at least 2 seeds per group are needed, with different values"]
    low, high, _ = welch(first.values, second.values)
    if "accuracy" in metric and max(-low, high) > 1:
        line += ", 95% interval wider than -100 to +100: train more seeds"
    else:
        line += f", 95% interval {number(low, metric, '+', images)} to {number(high, metric, '+', images)}"
    line += f", p = {p:.2g}"
    if p <= LEVEL:
        better = min(first, second, key=lambda group: sort_key(group.mean, metric))
        return [f"{line}: {better.label} is better"]
    # Bonferroni's level, which Holm's method applies to the smallest p-value
    needed = seeds_needed(difference, (first.deviation, second.deviation), LEVEL / num_tested)
    seeds = f"about {needed:,}" if needed <= MOST_SEEDS else f"more than {MOST_SEEDS:,}"
    hint = f"  to detect a difference of this size (power {POWER:.0%}), each group needs {seeds} seeds"
    return [f"{line}: not statistically significant", hint]


def warnings(groups: Sequence[Group]) -> list[str]:
    """Return warnings about differences between the runs that make the comparison less reliable."""
    lines = []
    labels: Mapping[str, Any] = defaultdict(lambda: defaultdict(dict))  # group labels, by circumstance and value
    for group in groups:
        if group.repeats:
            folders = ", ".join(str(run.folder) for run in group.repeats)
            lines.append(f"each seed counts once: {group.label} leaves out {folders}, whose seed a later run repeats.")
        for circumstance, value in _circumstances(group):
            labels[circumstance][value][group.label] = True
    for circumstance, values in labels.items():
        if len(values) > 1:
            parts = (f"{value} ({', '.join(labels)})" for value, labels in values.items())
            lines.append(f"{circumstance} differs: {'; '.join(parts)}")
    if any(commit.endswith("-dirty") for commit in labels["git_commit"]):
        lines.append("some code had uncommitted changes (-dirty), which are not recorded.")
    return lines


def _circumstances(group: Group) -> Iterator[tuple[str, str]]:
    """Yield the circumstances that should be the same in all sessions of all runs that are compared."""
    for record in group.records:
        for session in record.sessions:
            same = _images(record)
            same |= {"git_commit": session["git_commit"] or "unknown", "versions": session["versions"]}
            if group.metric.startswith("test_"):
                same["tta"] = record.tta
            if is_time(group.metric):
                same["hardware"] = session["hardware"]
            yield from flat(same).items()
