"""Comparing groups of runs: differences, what they are worth, and what makes them less comparable than they look."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cifarnet.errors import UserError
from cifarnet.runs.significance import LEVEL, MOST_SEEDS, POWER, Welch, holm, interval, seeds_needed, welch
from cifarnet.runs.tables import Group, Run, columns, grouped, is_time, lower_is_better, read_metrics, varied
from cifarnet.settings import deciding

KINDS = "Name a run's folder, its metrics.json, or a folder above runs."
RUN = {"config", "history"}  # an evaluation's metrics.json has no history

Pair = tuple[Group, Group, Welch]  # first minus second; its p is corrected for all pairs that are compared


def find(paths: Iterable[str], metric: str) -> dict[Path, Run]:
    """All runs at or below these paths, by the place of their `metrics.json`.

    Raises:
        UserError: there is no such path, or no run in it, or a file that cannot be read.
    """
    found: dict[Path, Run] = {}
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise UserError(f"{given}: no such file or folder. {KINDS}")
        files = [path] if path.is_file() else sorted(path.rglob("metrics.json"))
        contents = [(file.resolve(), read_metrics(file)) for file in files]
        runs = {file: make_run(file, record, metric) for file, record in contents if record.keys() >= RUN}
        if not runs:
            raise UserError(
                f"{given} holds no finished run (a metrics.json as cifarnet.train writes at the end). {KINDS}"
            )
        found |= runs
    return found


def make_run(file: Path, metrics: dict[str, Any], metric: str) -> Run:
    """With the settings that can decide the metric, and the precision that was really used."""
    run = Run(file.parent, deciding(metrics["config"], times=is_time(metric)), metrics)
    if precisions := [str(stretch["precision"]) for stretch in _stretches([run]) if "precision" in stretch]:
        run.settings["trainer.precision"] = " / ".join(dict.fromkeys(precisions))
    return run


def _stretches(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Their records, one for each stretch of training: where a run was resumed, hardware and versions may change."""
    return [run.metrics | stretch for run in runs for stretch in run.metrics.get("stretches") or [{}]]


def load(places: Sequence[str], against: Sequence[str], metric: str) -> tuple[list[Group], list[str]]:
    """The groups, labelled, those of `against` last; and what is left out, in words.

    Raises:
        UserError: there is nothing to compare, or a file cannot be read.
    """
    baseline = find(against, metric)
    runs = [run for file, run in find(places, metric).items() if file not in baseline]
    if not runs:
        raise UserError(f"{' '.join(places)} holds no run that --against {' '.join(against)} does not.")
    groups, left_out = _side(runs, metric)
    if baseline:
        beside, without = _side(list(baseline.values()), metric)
        for group in beside:
            group.baseline = True
        groups, left_out = groups + beside, left_out + without
    for number, group in enumerate(groups):
        group.label = letter(number)
    return groups, left_out


def _side(found: Sequence[Run], metric: str) -> tuple[list[Group], list[str]]:
    """The groups of these runs; what is left out of them: records of version 0.1, and those without the metric."""
    left_out = []
    if old := [os.path.relpath(run.folder) for run in found if "resolved" not in run.metrics]:
        names = old[0] + (f" and {len(old) - 1} more" if len(old) > 1 else "")
        why = "recorded by an older version of cifarnet, whose settings cannot be compared"
        if len(old) == len(found):
            raise UserError(f"{names}: {why}. Repeat what you want to compare.")
        left_out.append(f"{names}: left out, {why}.")
    runs = [run for run in found if "resolved" in run.metrics]
    with_metric = [run for run in runs if math.isfinite(run.value(metric))]
    if not with_metric:
        where, has = os.path.relpath(runs[0].folder / "metrics.json"), runs[0].metrics
        null = " (it is null there: without validation images there is no val_accuracy)" if metric in has else ""
        numbers = ", ".join(key for key in has if math.isfinite(runs[0].value(key)))
        raise UserError(f"metric={metric}: {where} has no such number{null}. It has {numbers}.")
    without = [os.path.relpath(run.folder) for run in runs if run not in with_metric]
    left_out += [f"{folder} is left out: its {metric} is null." for folder in without]
    return grouped(with_metric, metric, alike=lambda run: _data(run.metrics)), left_out


def letter(number: int) -> str:
    """a to z, then aa, ab, …"""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Each group with each baseline, or, without baselines, the best with each other group."""
    baselines = [group for group in groups if group.baseline]
    others = [group for group in groups if not group.baseline]
    if baselines:
        chosen = [(first, second) for second in baselines for first in others]
    else:
        chosen = [(others[0], second) for second in others[1:]]
    found = [welch(first.values, second.values) for first, second in chosen]
    corrected = holm([one.p for one in found])
    return [(*pair, one._replace(p=p)) for pair, one, p in zip(chosen, found, corrected, strict=True)]


class Unit(NamedTuple):
    """How a metric's values are written."""

    factor: float
    decimals: int
    symbol: str
    points: str  # of a difference

    @classmethod
    def of(cls, metric: str, values: Iterable[float]) -> "Unit":
        if "accuracy" in metric:
            return cls(100, 2, " %", " points")
        largest = max(map(abs, values))
        decimals = max(0, 3 - math.floor(math.log10(largest))) if largest else 0  # four digits of the largest
        symbol = " images/s" if metric == "images_per_second" else " s" if is_time(metric) else ""
        return cls(1, decimals, symbol, symbol)

    def number(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign},.{self.decimals}f}"

    def of_group(self, group: Group) -> str:
        spread = f" ± {self.number(group.deviation)}" if len(group.values) > 1 else ""
        return f"{self.number(group.mean)}{spread}{self.symbol}"


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The settings that differ, each with its value in every group, short."""
    return {key.removesuffix("._target_"): [_shown(key, group.settings) for group in groups] for key in varied(groups)}


def _shown(key: str, settings: dict[str, str]) -> str:
    value = settings.get(key, "none")
    if key.endswith("_target_"):
        return value.rpartition(".")[2]
    return re.sub(r"^\$\{([^{}]+)\}$", r"= \1", value)  # it follows another setting


def table(groups: Sequence[Group], metric: str, unit: Unit) -> str:
    """The groups as lines of text; what differs between them in columns, or below if it is much."""
    settings = differences(groups)
    labels = [group.label for group in groups]
    folders = [os.path.relpath(os.path.commonpath([run.folder for run in group.counted])) for group in groups]
    cells = [
        ["", *labels],
        ["", *(group.name for group in groups)],
        [metric.replace("_", " "), *(unit.of_group(group) for group in groups)],
        ["n", *(str(len(group.values)) for group in groups)],
    ]
    if len(settings) <= 4:
        cells += [[key, *values] for key, values in settings.items()]
    if len(set(folders)) > 1:
        cells.append(["folder", *folders])
    lines = columns(list(zip(*cells, strict=True)))
    if len(settings) > 4:
        lines += ["", f"  different in {' / '.join(labels)}:"]
        lines += [f"    {key}: {' / '.join(values)}" for key, values in settings.items()]
    return "\n".join(lines)


def verdict(pair: Pair, metric: str, unit: Unit, tested: int) -> str:
    """The difference, its interval and p-value, what follows, and on another line what would be needed to tell."""
    first, second, found = pair
    line = f"{first.label} - {second.label}: {unit.number(found.difference, '+')}{unit.points}"
    if min(len(first.values), len(second.values)) < 2:
        return f"{line}; no interval: at least 2 seeds of each are needed"
    if math.isnan(found.p):
        return f"{line}; no interval: neither group's values vary, so nothing is known about luck"
    line += f", 95 % interval {unit.number(found.low, '+')} to {unit.number(found.high, '+')}"
    line += ", p < 0.0001" if found.p < 0.0001 else f", p = {found.p:.2g}"
    if found.p <= LEVEL:
        better = first if (found.difference < 0) == lower_is_better(metric) else second
        return f"{line}: {better.label} is better"
    return f"{line}: not distinguishable{more_seeds(pair, tested)}"


def more_seeds(pair: Pair, tested: int) -> str:
    """How many more seeds the test would need to find a difference as large as the one observed."""
    first, second, found = pair
    if found.difference == 0:
        return ""
    # Bonferroni's level: what Holm asks of the smallest p-value
    needed = seeds_needed(found.difference, (first.deviation, second.deviation), LEVEL / tested)
    if needed is None:
        return f"\n    more than {MOST_SEEDS:,} seeds each would be needed to tell a difference of this size"
    missing = [max(0, needed - len(group.values)) for group in (first, second)]
    if not any(missing):
        return ""
    if missing[0] == missing[1]:
        count = f"{missing[0]:,} more seed{'s' if missing[0] > 1 else ''} each"
    else:
        count = f"{missing[0]:,} more seeds of {first.label} and {missing[1]:,} of {second.label}"
    return f"\n    about {count} would be needed to tell a difference of this size (power {100 * POWER:.0f} %)"


def notes(groups: Sequence[Group], pairs: Sequence[Pair], tested: int) -> list[str]:
    """How the figures below the table came about."""
    baselines = sum(group.baseline for group in groups)
    others = len(groups) - baselines
    lines = [] if pairs else ["One group: nothing to compare it with."]
    if baselines and len(pairs) > 1:
        lines.append(f"{others} of the runs' groups are compared with {baselines} to compare against, each with each.")
    if tested == 1:
        lines.append("p: Welch's t-test, two-sided.")
    elif tested:
        lines.append(
            f"p: Welch's t-test, two-sided, corrected for {tested} comparisons by Holm's method. "
            "Each interval is for its one comparison."
        )
    if others > 1 and len(pairs) > 1:
        best = groups[0].label
        lines.append(f"{best} is the best of {others} by these very figures, which flatters it: repeat with new seeds.")
    return lines


def warnings(groups: Sequence[Group], metric: str) -> list[str]:
    """What makes the groups' figures less comparable than they look."""
    lines = []
    for group in groups:
        if group.repeats:
            folders = ", ".join(os.path.relpath(run.folder) for run in group.repeats)
            lines.append(
                f"a seed counts once: of {group.label}, {folders} is no further sample, "
                "but repeats a run that finished later."
            )
        if len(group.values) == 1:
            lines.append(f"{group.label} has one seed: no deviation and no interval. Train at least 2.")
    stretches = [(group.label, stretch) for group in groups for stretch in _stretches(group.counted)]
    held: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # what, how it was, in which groups
    for label, stretch in stretches:
        for what, how in _circumstances(stretch, metric).items():
            held[what][str(how)].append(label)
    for what, found in held.items():
        if len(found) > 1:
            each = [f"{how} ({', '.join(dict.fromkeys(labels))})" for how, labels in found.items()]
            lines.append(f"{what}: {'; '.join(each)}")
    if any("-dirty" in str(stretch.get("git_commit")) for _, stretch in stretches):
        lines.append("some code was changed after its commit (-dirty): whether all ran the same is not recorded.")
    return lines


def _circumstances(metrics: dict[str, Any], metric: str) -> dict[str, Any]:
    """What is to be alike in all runs, after the words that say that it is not."""
    versions, hardware = dict(metrics.get("versions", {})), metrics.get("hardware", {})
    found = {
        "the data differ": _data(metrics),
        "PyTorch differs": versions.pop("torch", None),
        "the code differs": (metrics.get("git_commit") or "unknown")[:8],
    }
    if metric in ("test_accuracy", "test_cross_entropy"):
        found["test-time augmentation differs (test_accuracy_one_view is without)"] = metrics.get("tta")
    if is_time(metric):
        names = f"{hardware.get('name')}, {hardware.get('threads')} threads, {hardware.get('system')}"
        found["the hardware differs"] = names
        found["other versions differ"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return found


def _data(metrics: dict[str, Any]) -> str:
    data = metrics["data"]
    counts = " / ".join(f"{data[split]:,}" for split in ("train", "val", "test"))
    checksum = data["sha256"][:8] if data["sha256"] else f"unknown, {metrics['resolved']['data'].get('root')}"
    return f"{counts} images to train / validate / test, {data['classes']} classes, checksum {checksum}"


def plot(groups: Sequence[Group], metric: str, path: Path) -> None:
    """Each group's runs, mean and interval, into an image file."""
    from cifarnet.runs import figures

    settings = list(differences(groups).items())[:3]
    rows = []
    for number, group in enumerate(groups):
        title = [f"{group.label}  {group.name}, n = {len(group.values)}"]
        title += [f"{key}={values[number]}" for key, values in settings]
        rows.append(("\n".join(title), group.values, interval(group.values)))
    figure = figures.comparison(rows, metric.replace("_", " "), percent="accuracy" in metric)
    try:
        figures.save(figure, path)
    except (OSError, ValueError) as error:
        raise UserError(f"output={path} cannot be written: {error}") from error


def compare(places: Sequence[str], against: Sequence[str], metric: str, output: Path) -> None:
    """Print the comparison and draw it.

    Args:
        places: runs' folders, `metrics.json` files, or folders above runs; those in `against` too count there alone.
        against: the baseline; may be empty.
        metric: a number in `metrics.json`.
        output: where the picture goes.

    Raises:
        UserError: there is nothing to compare, a file cannot be read, or the picture cannot be written.
    """
    groups, left_out = load(places, against, metric)
    pairs = pairs_of(groups)
    unit = Unit.of(metric, [value for group in groups for value in group.values])
    tested = sum(math.isfinite(found.p) for _, _, found in pairs)
    print(f"\n{table(groups, metric, unit)}\n")
    for pair in pairs:
        print(f"  {verdict(pair, metric, unit, tested)}")
    for note in notes(groups, pairs, tested):
        print(f"  {note}")
    for warning in [*left_out, *warnings(groups, metric)]:
        print(f"  warning: {warning}")
    plot(groups, metric, output)
    print(f"  {output}\n")
