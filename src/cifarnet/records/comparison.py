"""Comparison of groups of runs: their differences, the significance of these, and warnings."""

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cifarnet.config import deciding_settings, flat
from cifarnet.errors import UserError
from cifarnet.records import tables
from cifarnet.records.record import NUMBERS, Record
from cifarnet.records.significance import LEVEL, MOST_SEEDS, POWER, holm, paired, seeds_needed, welch
from cifarnet.records.tables import Group, Run, column_table, differences, grouped, is_time, number, sort_key, unit

PAIRED = "paired t-test with a variance corrected for the overlap of the folds' training sets (Nadeau and Bengio, 2003)"


class Difference(NamedTuple):
    """The difference of the means of two groups, its 95% confidence interval and p-value, and the number of folds that
    were compared; None if the groups have no folds."""

    mean: float
    low: float
    high: float
    p: float
    num_folds: int | None = None


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
            group.label = tables.letter(len(groups))
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
    """Return the numbers of images and their checksum. Streamed images have no checksum but a location."""
    resolved = flat(record.resolved)
    checksum = record.data["sha256"][:8] if record.data["sha256"] else resolved.get("data.root")
    of_fold = ("train", "val") if "data.folds" in resolved else ()  # the sizes of folds differ by one
    ignored = {"train_per_class", "wrong_labels", *of_fold}
    return {"images": {key: value for key, value in record.data.items() if key not in ignored} | {"sha256": checksum}}


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
    compared = [_compare(first, second) for first, second in pairs]
    corrected = holm([difference.p for difference in compared])
    tested = [difference for difference in compared if math.isfinite(difference.p)]
    lines = []
    for (first, second), difference, p in zip(pairs, compared, corrected, strict=True):
        lines += _conclusion(first, second, difference._replace(p=p), len(tested))
    if tested:
        correction = f", corrected for {len(tested)} comparisons by Holm's method; the intervals are not corrected"
        paired_test = PAIRED if any(group.overlap for group in groups) else "paired t-test"
        tests = dict.fromkeys(paired_test if one.num_folds else "Welch's t-test" for one in tested)
        lines.append(f"p: {' and '.join(tests)}, two-sided{correction if len(tested) > 1 else ''}.")
    if len(others) > 1 and len(pairs) > 1:
        lines.append(
            f"{groups[0].label} was chosen as the best of {len(others)} groups from these same results, which makes it "
            "look better than it is. Repeat the comparison with new seeds or splits."
        )
    return lines


def _compare(first: Group, second: Group) -> Difference:
    """Compare the means of two groups or, if they have folds, the values of the folds that both have."""
    if not first.by_fold and not second.by_fold:
        return Difference(first.mean - second.mean, *welch(first.values, second.values))
    shared = [fold for fold in first.by_fold if fold in second.by_fold]
    differences = [first.by_fold[fold] - second.by_fold[fold] for fold in shared]
    mean = statistics.mean(differences or [first.mean - second.mean])
    return Difference(mean, *paired(differences, first.overlap), num_folds=len(shared))


def _conclusion(first: Group, second: Group, compared: Difference, num_tested: int) -> list[str]:
    """Return the difference of two groups, its interval and p-value, and the number of seeds needed to detect it."""
    metric, (difference, low, high, p, num_folds) = first.metric, compared
    images = min((group.images for group in (first, second) if group.images), default=None)
    points = f"{number(difference, metric, '+', images)}{unit(metric).replace('%', ' points')}"
    line = f"{first.label} - {second.label}: {points}"
    if math.isnan(p):
        needed = "seeds per group" if num_folds is None else "folds that both groups have"
        return [f"{line}; no interval: at least 2 {needed} are needed, with different values"]
    if "accuracy" in metric and max(-low, high) > 1:
        line += ", 95% interval wider than -100 to +100: train more seeds or splits"
    else:
        line += f", 95% interval {number(low, metric, '+', images)} to {number(high, metric, '+', images)}"
    line += f", p = {p:.2g}" if num_folds is None else f", paired over {num_folds} folds, p = {p:.2g}"
    if p <= LEVEL:
        better = first if sort_key(difference, metric) < 0 else second
        return [f"{line}: {better.label} is better"]
    if num_folds is not None:
        hint = "  to detect smaller differences, repeat the folds with other splits: 'data.split_seed=range(3)'"
        return [f"{line}: not statistically significant", hint]
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
