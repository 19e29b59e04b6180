"""Comparing groups of runs: differences, what they are worth, and what makes them less comparable than they look."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cifarnet.config import deciding_settings, flat
from cifarnet.errors import UserError
from cifarnet.records.figures import TRAIN, VAL
from cifarnet.records.significance import LEVEL, MOST_SEEDS, POWER, holm, interval, seeds_needed, welch
from cifarnet.records.tables import Group, Run, aligned, best_first, grouped, is_time, read_metrics, varied

OLD = "recorded by an older version of cifarnet, whose settings cannot be compared"

Record = dict[str, Any]  # the contents of a `metrics.json`


NEEDED = {  # of a record, and of each stretch of its training
    **dict.fromkeys(("config", "resolved", "resolved.data", "versions", "hardware", "data"), dict),
    **dict.fromkeys(("data.train", "data.val", "data.test", "data.classes"), int),
    **dict.fromkeys(("tta", "precision", "versions.torch"), str),
    **dict.fromkeys(("hardware.name", "hardware.threads", "hardware.system"), str | int),
    **dict.fromkeys(("git_commit", "data.sha256"), str | None),
    "config.callbacks": dict | None,
}


def _find(paths: Iterable[str]) -> tuple[dict[Path, Record], list[str]]:
    """The records of all runs at or below these paths, by their place; and what cannot be read, in words."""
    found: dict[Path, Record] = {}
    damaged = []
    for path in map(Path, paths):
        records = {}
        for file in [path] if path.is_file() else sorted(path.rglob("metrics.json")):
            try:
                records[file.resolve()] = read_metrics(file)
            except UserError as error:
                damaged.append(str(error))
        # an evaluation's file of that name has no history
        runs = {file: record for file, record in records.items() if {"config", "history"} <= record.keys()}
        if not runs:
            none = " holds no finished run (a metrics.json as cifarnet.train writes at the end)"
            problem = none if path.exists() else ": no such file or folder"
            remedy = "Name a run's folder, its metrics.json, or a folder above runs."
            raise UserError(" ".join([*damaged, f"{path}{problem}.", remedy]))
        found |= runs
    return found, [f"left out: {line}" for line in damaged]


def load(places: Sequence[str], against: Sequence[str], metric: str | None) -> tuple[list[Group], list[str], str]:
    """The groups, labelled, those of `against` last; what is left out, in words; and the metric.

    Args:
        metric: None: val_accuracy, or test_accuracy where a run has none of the former.

    Raises:
        UserError: there is nothing to compare.
    """
    (baseline, damaged), (given, also_damaged) = _find(against), _find(places)
    found = {file: record for file, record in given.items() if file not in baseline}
    if not found:
        raise UserError(f"{' '.join(places)} holds no run that --against {' '.join(against)} does not.")
    sides, left_out = [], damaged + also_damaged
    for side in filter(None, (found, baseline)):
        runs, lines = _usable(side)
        sides.append(runs)
        left_out += lines
    everywhere = all(math.isfinite(run.score) for runs in sides for run in runs)
    metric = metric or ("val_accuracy" if everywhere else "test_accuracy")
    groups: list[Group] = []
    for runs, is_baseline in zip(sides, (False, True), strict=False):
        measured, lines = _measured(runs, metric)
        left_out += lines
        for group in grouped(measured, metric, alike=lambda run: _data(run.metrics)):
            group.label, group.baseline = letter(len(groups)), is_baseline
            group.name = " / ".join(dict.fromkeys(str(run.metrics.get("name")) for run in group.counted))
            group.name += " (baseline)" if is_baseline else ""
            groups.append(group)
    return groups, left_out, metric


def _usable(found: dict[Path, Record]) -> tuple[list[Run], list[str]]:
    """These runs; what is left out of them: records of version 0.1, incomplete ones, and runs on a part of the images.

    Raises:
        UserError: none is left.
    """
    runs, left_out, old = [], [], []
    for file, record in found.items():
        if "resolved" not in record:
            old.append(os.path.relpath(file.parent))
        elif damage := _damage(record):
            left_out.append(f"{os.path.relpath(file)}: left out, {damage}.")
        elif record.get("partial"):
            left_out.append(f"{os.path.relpath(file.parent)}: left out, a trial run ({record['partial']}).")
        else:
            runs.append(Run(file.parent, {}, record))
    if old:
        names = old[0] + (f" and {len(old) - 1} more" if len(old) > 1 else "")
        left_out.append(f"{names}: left out, {OLD}.")
    if not runs:
        raise UserError(" ".join([*left_out, "Repeat what you want to compare."]))
    return runs, left_out


def _damage(record: Record) -> str | None:
    """Why a record cannot be compared."""
    sessions = record.get("sessions") or [{}]
    if not isinstance(sessions, list) or not all(isinstance(stretch, dict) for stretch in sessions):
        return "its sessions are no list of what each ran on"
    for key, kind in NEEDED.items():
        for value in (record | stretch for stretch in sessions):
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, kind):
                return f"its {key} is missing or damaged"
    try:
        flat(record["config"])
    except RecursionError:
        return "its config is nested too deeply"
    return None


def _measured(runs: Sequence[Run], metric: str) -> tuple[list[Run], list[str]]:
    """The runs that have the metric, with the settings that can decide it and the precision that was really used."""
    measured = [run for run in runs if math.isfinite(run.value(metric))]
    if not measured:
        first = runs[0]
        null = " (it is null there: without validation images there is no val_accuracy)"
        has = f"{null if metric in first.metrics else ''}. It has "
        has += ", ".join(key for key in first.metrics if math.isfinite(first.value(key)))
        file = os.path.relpath(first.folder / "metrics.json")
        raise UserError(f"metric={metric}: {file} has no such number{has}.")
    for run in measured:
        precisions = dict.fromkeys(str(stretch["precision"]) for stretch in _sessions(run))
        run.settings = deciding_settings(run.metrics["config"], times=is_time(metric))
        run.settings["trainer.precision"] = " / ".join(precisions)
    without = [os.path.relpath(run.folder) for run in runs if run not in measured]
    return measured, [f"{folder} is left out: its {metric} is no number." for folder in without]


def _sessions(run: Run) -> list[Record]:
    """Its record, once for each stretch of training: where it was resumed, hardware and versions may change."""
    return [run.metrics | stretch for stretch in run.metrics.get("sessions") or [{}]]


def letter(number: int) -> str:
    """a to z, then aa, ab, …"""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


class Metric:
    """Its name, and how its values are written: accuracies in percent, others with four digits of the largest."""

    def __init__(self, name: str, groups: Iterable[Group]) -> None:
        self.name, self.factor, self.decimals, self.unit, self.points = name, 100, 2, " %", " points"
        if "accuracy" not in name:
            largest = max(abs(value) for group in groups for value in group.values)
            self.factor, self.decimals = 1, max(0, 3 - math.floor(math.log10(largest))) if largest else 0
            self.unit = " images/s" if name == "images_per_second" else " s" if is_time(name) else ""
            self.points = self.unit  # of a difference

    def text(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign},.{self.decimals}f}"


def _differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The settings that vary, and each group's value, as people read them; `= seed` is one that follows another."""
    shown = {}
    for key in varied(groups):
        values = [group.settings.get(key, "none") for group in groups]
        if key.endswith("_target_"):
            values = [value.rpartition(".")[2] for value in values]
        shown[key.removesuffix("._target_")] = [re.sub(r"^\$\{([^{}]+)\}$", r"= \1", value) for value in values]
    return shown


def table(groups: Sequence[Group], metric: Metric) -> str:
    """The groups as lines of text; what differs between them in columns, or below if it is much."""
    columns = {"": [group.label for group in groups], " ": [group.name for group in groups]}
    spreads = [f" ± {metric.text(group.deviation)}" if len(group.values) > 1 else "" for group in groups]
    means = [f"{metric.text(group.mean)}{spread}{metric.unit}" for group, spread in zip(groups, spreads, strict=True)]
    columns |= {metric.name.replace("_", " "): means, "n": [str(len(group.values)) for group in groups]}
    differing, below = _differing(groups), []
    if len(differing) <= 4:
        columns |= differing
    else:
        below = ["", f"  different in {' / '.join(columns[''])}:"]
        below += [f"    {key}: {' / '.join(values)}" for key, values in differing.items()]
    folders = [os.path.relpath(os.path.commonpath([run.folder for run in group.counted])) for group in groups]
    if len(set(folders)) > 1:
        columns["folder"] = folders
    return "\n".join([aligned(columns), *below])


def verdicts(groups: Sequence[Group], metric: Metric) -> list[str]:
    """Of each group and each baseline, or, without baselines, of the best and each other one; how they came about."""
    others, baselines = ([group for group in groups if group.baseline == side] for side in (False, True))
    pairs = [(first, second) for second in baselines for first in others]
    pairs = pairs or [(groups[0], second) for second in groups[1:]]
    if not pairs:
        return ["One group: nothing to compare it with."]
    tests = [welch(first.values, second.values) for first, second in pairs]
    corrected = holm([p for _, _, p in tests])
    tested = sum(map(math.isfinite, corrected))
    lines = []
    for pair, (low, high, _), p in zip(pairs, tests, corrected, strict=True):
        lines.append(_verdict(pair, (low, high, p), metric, tested))
    sides, several = f"{len(others)} of the runs' groups are compared with {len(baselines)}", len(pairs) > 1
    if baselines and several:
        lines.append(f"{sides} to compare against, each with each.")
    if tested == 1:
        lines.append("p: Welch's t-test, two-sided.")
    elif tested:
        holms = f"corrected for {tested} comparisons by Holm's method"
        lines.append(f"p: Welch's t-test, two-sided, {holms}. Each interval is for its one comparison.")
    if len(others) > 1 and several:
        best = f"{groups[0].label} is the best of {len(others)} by these very figures"
        lines.append(f"{best}, which flatters it: repeat with new seeds.")
    return lines


def _verdict(pair: tuple[Group, Group], test: tuple[float, float, float], metric: Metric, tested: int) -> str:
    """The difference, its interval and p-value, what follows, and on another line what would be needed to tell."""
    (first, second), (low, high, p) = pair, test
    line = f"{first.label} - {second.label}: {metric.text(first.mean - second.mean, '+')}{metric.points}"
    if min(len(first.values), len(second.values)) < 2:
        return f"{line}; no interval: at least 2 seeds of each are needed"
    if math.isnan(p):
        return f"{line}; no interval: neither group's values vary, so nothing is known about luck"
    line += f", 95 % interval {metric.text(low, '+')} to {metric.text(high, '+')}, p "
    line += "< 0.0001" if p < 0.0001 else f"= {p:.2g}"
    if p <= LEVEL:
        better = min(first, second, key=lambda group: best_first(group.mean, metric.name))
        return f"{line}: {better.label} is better"
    # Bonferroni's level: what Holm asks of the smallest p-value
    return f"{line}: not distinguishable{_more_seeds(first, second, LEVEL / tested)}"


def _more_seeds(first: Group, second: Group, level: float) -> str:
    """How many more seeds the test would need to find a difference as large as the one observed."""
    difference, deviations = first.mean - second.mean, (first.deviation, second.deviation)
    needed = seeds_needed(difference, deviations, level) if difference else 0
    if needed is None:
        return f"\n    more than {MOST_SEEDS:,} seeds each would be needed to tell a difference of this size"
    one, other = (max(0, needed - len(group.values)) for group in (first, second))
    if not one and not other:
        return ""
    count = f"{one:,} more seeds of {first.label} and {other:,} of {second.label}"
    if one == other:
        count = f"{one:,} more seed{'s' if one > 1 else ''} each"
    return f"\n    about {count} would be needed to tell a difference of this size (power {100 * POWER:.0f} %)"


def warnings(groups: Sequence[Group], metric: str) -> list[str]:
    """What makes the groups' figures less comparable than they look."""
    lines = []
    for group in groups:
        if group.repeats:
            folders = ", ".join(os.path.relpath(run.folder) for run in group.repeats)
            why = "is no further sample, but repeats a run that finished later"
            lines.append(f"a seed counts once: of {group.label}, {folders} {why}.")
        if len(group.values) == 1:
            lines.append(f"{group.label} has one seed: no deviation and no interval. Train at least 2.")
    records = [(group.label, record) for group in groups for run in group.counted for record in _sessions(run)]
    circumstances = [(label, _circumstances(record, metric)) for label, record in records]
    for what in circumstances[0][1]:
        where: dict[str, dict[str, None]] = {}  # each description, with the groups it holds for
        for label, found in circumstances:
            where.setdefault(found[what], {})[label] = None
        if len(where) > 1:
            lines.append(f"{what}: " + "; ".join(f"{how} ({', '.join(labels)})" for how, labels in where.items()))
    if any("-dirty" in str(record["git_commit"]) for _, record in records):
        lines.append("some code was changed after its commit (-dirty): whether all ran the same is not recorded.")
    return lines


def _circumstances(record: Record, metric: str) -> dict[str, str]:
    """What is to be alike in runs that are compared, by what is told where it is not."""
    versions, hardware = record["versions"], record["hardware"]
    found = {
        "the data differ": _data(record),
        "PyTorch differs": versions["torch"],
        "the code differs": (record["git_commit"] or "unknown")[:8],
    }
    if metric in ("test_accuracy", "test_cross_entropy"):
        found["test-time augmentation differs (test_accuracy_one_view is without)"] = record["tta"]
    if is_time(metric):
        found["the hardware differs"] = "{name}, {threads} threads, {system}".format_map(hardware)
        others = (f"{name} {version}" for name, version in versions.items() if name != "torch")
        found["other versions differ"] = ", ".join(others)
    return found


def _data(record: Record) -> str:
    data = record["data"]
    counts = " / ".join(f"{data[split]:,}" for split in ("train", "val", "test"))
    checksum = data["sha256"][:8] if data["sha256"] else f"unknown, {record['resolved']['data'].get('root')}"
    return f"{counts} images to train / validate / test, {data['classes']} classes, checksum {checksum}"


def draw(groups: Sequence[Group], metric: str) -> Figure:
    """One row a group: its runs as dots, and their mean with its 95 % confidence interval."""
    differing = list(_differing(groups).items())[:3]
    height = 1.2 + 0.22 * len(groups) * (2 + len(differing))
    axis = Figure(figsize=(8, height), dpi=150, layout="constrained").subplots()
    titles, share = [], "accuracy" in metric
    for row, group in enumerate(groups):
        settings = [f"{key}={values[row]}" for key, values in differing]
        titles.append("\n".join([f"{group.label}  {group.name}, n = {len(group.values)}", *settings]))
        axis.plot(
            group.values,
            [row] * len(group.values),
            "o",
            color=TRAIN,
            alpha=0.5,
            clip_on=False,
            label="" if row else "runs",
        )
        half = interval(group.values)
        room = [group.mean, 1 - group.mean] if share else [half, half]  # no accuracy is below 0 or above 100 %
        bars = [[half if math.isnan(half) else min(half, side)] for side in room]
        mean = {"xerr": bars, "label": "" if row else "mean, 95 % interval"}
        axis.errorbar(group.mean, row + 0.2, fmt="D", color=VAL, markersize=5, capsize=4, clip_on=False, **mean)
    axis.set_yticks(range(len(groups)), titles)
    name = metric.replace("_", " ")
    axis.set(ylim=(len(groups) - 0.4, -0.6), xlabel=name, title=f"{name.capitalize()} by group")
    if share:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlim(max(0, axis.get_xlim()[0]), min(1, axis.get_xlim()[1]))
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis.figure
