"""Comparison of groups of runs: the differences, whether they are significant, and what makes them unreliable."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifarnet.config import deciding_settings
from cifarnet.errors import UserError
from cifarnet.records.record import NUMBERS, Record
from cifarnet.records.significance import LEVEL, MOST_SEEDS, POWER, holm, seeds_needed, welch
from cifarnet.records.tables import Group, Run, column_table, grouped, is_time, sort_key, varied

CODE = "the code differs"


def load(paths: Sequence[str], against: Sequence[str], metric: str | None) -> tuple[list[Group], list[str], str]:
    """Read and group the runs at or below `paths`, and then those of the baseline, `against`.

    Args:
        metric: a number in `metrics.json`; None: val_accuracy, or test_accuracy if a run has no val_accuracy.

    Returns:
        The groups, a sentence for each run that is left out, and the metric.

    Raises:
        UserError: there is nothing to compare.
    """
    if metric not in (None, *NUMBERS):
        raise UserError(f"metric={metric}: metrics.json has no such number. Choose one of {', '.join(NUMBERS)}.")
    baseline = [file for path in against for file in _files(path)]
    records: dict[Path, Record] = {}
    left_out = []
    for file in dict.fromkeys([file for path in paths for file in _files(path)] + baseline):
        try:
            record = Record.read(Path(os.path.relpath(file)))
        except UserError as error:
            left_out.append(f"left out: {error}")
            continue
        if record.partial:
            left_out.append(f"{os.path.relpath(file.parent)} is left out: it is a partial run ({record.partial}).")
        else:
            records[file] = record
    if metric is None:
        all_have_it = all(math.isfinite(record.val_accuracy) for record in records.values())
        metric = "val_accuracy" if all_have_it else "test_accuracy"
    without = [file for file, record in records.items() if metric not in record.numbers()]
    left_out += [f"{os.path.relpath(file.parent)} is left out: its {metric} is null." for file in without]
    groups: list[Group] = []
    for is_baseline in (False, True) if against else (False,):
        files = [file for file in records if file not in without and (file in baseline) == is_baseline]
        if not files:
            side = f"--against {' '.join(against)}" if is_baseline else " ".join(paths)
            hint = "Choose other runs, or another metric=…. (Runs at or below --against are only used as the baseline.)"
            raise UserError(" ".join([f"{side}: no run can be compared.", *left_out, hint]))
        runs = [Run(file.parent, _settings(records[file], metric), record=records[file]) for file in files]
        for group in grouped(runs, metric, key=lambda run: _images(_record(run))):
            name = " / ".join(dict.fromkeys(_record(run).name for run in group.counted))
            name += " (baseline)" if is_baseline else ""
            groups.append(replace(group, label=letter(len(groups)), name=name, is_baseline=is_baseline))
    return groups, left_out, metric


def _files(path: str) -> list[Path]:
    """The `metrics.json` of all runs at or below a path; those of evaluations have a report beside them."""
    files = [Path(path)] if Path(path).is_file() else Path(path).rglob("metrics.json")
    found = sorted(file.resolve() for file in files if not file.with_name("report.html").exists())
    if not found:
        problem = "holds no finished run" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} {problem}. Name the folder of a run, its metrics.json, or a folder above runs.")
    return found


def _settings(record: Record, metric: str) -> dict[str, str]:
    """The settings that decide a metric, with the precision that was used instead of `auto`."""
    precisions = dict.fromkeys(session["precision"] for session in _sessions(record))
    settings = deciding_settings(record.config, times=is_time(metric))
    return settings | {"trainer.precision": " / ".join(precisions)}


def _sessions(record: Record) -> Sequence[Mapping[str, Any]]:
    return record.sessions or [vars(record)]


def _record(run: Run) -> Record:
    assert run.record is not None
    return run.record


def _images(record: Record) -> str:
    data = record.data
    counts = f"{data['train']:,} / {data['val']:,} / {data['test']:,} images to train / validate / test"
    checksum = data["sha256"][:8] if data["sha256"] else f"unknown, {record.resolved['data'].get('root')}"
    return f"{counts}, {data['classes']} classes, checksum {checksum}"


def letter(number: int) -> str:
    """The label of a group: a to z, then aa, ab, …"""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


class Metric:
    """How the values of a metric are written: accuracies in percent, other values with four digits of the largest.

    Attributes:
        unit: of values; `difference_unit` is that of differences.
    """

    def __init__(self, name: str, groups: Iterable[Group]) -> None:
        self.name, self.factor, self.decimals, self.unit, self.difference_unit = name, 100, 2, " %", " points"
        if "accuracy" not in name:
            largest = max(abs(value) for group in groups for value in group.values)
            self.factor, self.decimals = 1, max(0, 3 - math.floor(math.log10(largest))) if largest else 0
            self.unit = " images/s" if name == "images_per_second" else " s" if is_time(name) else ""
            self.difference_unit = self.unit

    def text(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign},.{self.decimals}f}"


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The settings that vary, with the value of each group; "= seed" is a setting that follows another one."""
    shown = {}
    for key in varied(groups):
        values = [group.settings.get(key, "none") for group in groups]
        if key.endswith("_target_"):
            values = [value.rpartition(".")[2] for value in values]
        shown[key.removesuffix("._target_")] = [re.sub(r"^\$\{([^{}]+)\}$", r"= \1", value) for value in values]
    return shown


def table(groups: Sequence[Group], metric: Metric) -> str:
    """The groups as a table. Up to four settings that differ are columns; more are listed below."""
    means = []
    for group in groups:
        spread = f" ± {metric.text(group.deviation)}" if len(group.values) > 1 else ""
        means.append(f"{metric.text(group.mean)}{spread}{metric.unit}")
    columns = {"": [group.label for group in groups], " ": [group.name for group in groups]}
    columns |= {metric.name.replace("_", " "): means, "n": [str(len(group.values)) for group in groups]}
    differing, below = differences(groups), []
    if len(differing) <= 4:
        columns |= differing
    else:
        below = ["", f"  different in {' / '.join(columns[''])}:"]
        below += [f"    {key}: {' / '.join(values)}" for key, values in differing.items()]
    folders = [os.path.relpath(os.path.commonpath([run.folder for run in group.counted])) for group in groups]
    if len(set(folders)) > 1:
        columns["folder"] = folders
    return "\n".join([column_table(columns), *below])


def conclusions(groups: Sequence[Group], metric: Metric) -> list[str]:
    """Compare each group with each baseline or, without baselines, the best group with each other group."""
    others, baselines = ([group for group in groups if group.is_baseline == side] for side in (False, True))
    pairs = [(first, second) for second in baselines for first in others]
    pairs = pairs or [(groups[0], second) for second in groups[1:]]
    if not pairs:
        return ["There is only one group: nothing to compare it with."]
    tests = [welch(first.values, second.values) for first, second in pairs]
    corrected = holm([p for _, _, p in tests])
    num_tested = sum(map(math.isfinite, corrected))
    lines = []
    for pair, (low, high, _), p in zip(pairs, tests, corrected, strict=True):
        lines.append(_conclusion(pair, (low, high, p), metric, num_tested))
    if num_tested:
        correction = f", corrected for {num_tested} comparisons by Holm's method; the intervals are not corrected"
        lines.append(f"p: Welch's t-test, two-sided{correction if num_tested > 1 else ''}.")
    if len(others) > 1 and len(pairs) > 1:
        lines.append(
            f"{groups[0].label} was chosen as the best of {len(others)} groups by these same results, which makes it "
            "look better than it is: repeat it with new seeds."
        )
    return lines


def _conclusion(pair: tuple[Group, Group], test: tuple[float, float, float], metric: Metric, num_tested: int) -> str:
    """The difference of two groups, its interval and p-value, and on another line how many more seeds are needed."""
    (first, second), (low, high, p) = pair, test
    line = f"{first.label} - {second.label}: {metric.text(first.mean - second.mean, '+')}{metric.difference_unit}"
    if min(len(first.values), len(second.values)) < 2:
        return f"{line}; no interval: at least 2 seeds of each group are needed"
    if math.isnan(p):
        return f"{line}; no interval: the values of neither group vary"
    line += f", 95 % interval {metric.text(low, '+')} to {metric.text(high, '+')}, p "
    line += "< 0.0001" if p < 0.0001 else f"= {p:.2g}"
    if p <= LEVEL:
        better = min(first, second, key=lambda group: sort_key(group.mean, metric.name))
        return f"{line}: {better.label} is better"
    # Bonferroni's level, which Holm's method applies to the smallest p-value
    return f"{line}: not distinguishable{_more_seeds(first, second, LEVEL / num_tested)}"


def _more_seeds(first: Group, second: Group, level: float) -> str:
    """How many more seeds the test needs to detect a difference as large as the one observed."""
    difference, deviations = first.mean - second.mean, (first.deviation, second.deviation)
    needed = seeds_needed(difference, deviations, level) if difference else 0
    start = f"\n    to detect a difference of this size (power {100 * POWER:.0f} %), train"
    if needed is None:
        return f"{start} more than {MOST_SEEDS:,} seeds of each group"
    more = {group.label: needed - len(group.values) for group in (first, second)}
    counts = [f"{count:,} of {label}" for label, count in more.items() if count > 0]
    return f"{start} about this many more seeds: {', '.join(counts)}" if counts else ""


def warnings(groups: Sequence[Group], metric: str) -> list[str]:
    """What makes a comparison of the groups less reliable than it looks."""
    lines = []
    for group in groups:
        if group.repeats:
            folders = ", ".join(os.path.relpath(run.folder) for run in group.repeats)
            lines.append(f"each seed counts once: in {group.label}, {folders} repeats the seed of a later run.")
        if len(group.values) == 1:
            lines.append(f"{group.label} has one seed: no deviation and no interval. Train at least 2.")
    where: dict[str, dict[str, list[str]]] = {}  # what may differ -> description -> labels
    for group in groups:
        for what, description in dict.fromkeys(_circumstances(group, metric)):
            where.setdefault(what, {}).setdefault(description, []).append(group.label)
    for what, descriptions in where.items():
        if len(descriptions) > 1:
            parts = (f"{description} ({', '.join(labels)})" for description, labels in descriptions.items())
            lines.append(f"{what}: {'; '.join(parts)}")
    if any("-dirty" in commit for commit in where[CODE]):
        lines.append("some code had uncommitted changes (-dirty), which are not recorded.")
    return lines


def _circumstances(group: Group, metric: str) -> Iterator[tuple[str, str]]:
    """What should be the same in all runs that are compared, in each session of their training."""
    for record in map(_record, group.counted):
        yield "the data differ", _images(record)
        if metric in ("test_accuracy", "test_cross_entropy"):
            yield "test-time augmentation differs (compare test_accuracy_one_view instead)", record.tta
        for session in _sessions(record):
            versions, hardware, commit = session["versions"], session["hardware"], session["git_commit"] or "unknown"
            yield CODE, commit[:8] + ("-dirty" if commit.endswith("-dirty") else "")
            yield "PyTorch differs", versions["torch"]
            if is_time(metric):
                yield "the hardware differs", "{name}, {threads} threads, {system}".format_map(hardware)
                others = (f"{name} {version}" for name, version in versions.items() if name != "torch")
                yield "other versions differ", ", ".join(others)
