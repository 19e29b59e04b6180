"""Runs as the files in their folders tell of them, grouped by what they share, and tables of text.

A run's folder holds `metrics.json` in the end. A sweep's job has Hydra's record of its overrides there from the start,
and `error.txt` or `pruned.txt` where it came to nothing.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifarnet.errors import UserError


@dataclass(eq=False)
class Run:
    """`settings` is what tells it from others: a job's overrides, or the part of a config that decides its figures.

    `metrics` is its `metrics.json`; `status` is done, failed, pruned, damaged, running or cut off, and `note` says more
    of it.
    """

    folder: Path
    settings: dict[str, str]
    metrics: dict[str, Any]
    status: str = "done"
    note: str = ""

    def value(self, metric: str) -> float:
        """A number in `metrics.json`; NaN where there is none."""
        value = self.metrics.get(metric)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return math.nan
        try:
            return float(value)
        except OverflowError:  # JSON's whole numbers have no end
            return math.nan

    @property
    def score(self) -> float:
        """Validation accuracy, from 0 to 1; NaN where there is none."""
        return self.value("val_accuracy")


class Group:
    """Runs that differ only by seed, and their values of a metric, with mean and deviation (NaN where there is none).

    Of each seed only the run that finished last is `counted`: the others are no further samples, but `repeats`. Times
    are another matter: they vary between runs of one seed too.
    """

    def __init__(self, settings: dict[str, str], runs: Sequence[Run], metric: str) -> None:
        self.settings, self.runs = settings, runs
        self.label, self.name, self.baseline = "", "", False  # until it is compared
        measured = [run for run in runs if math.isfinite(run.value(metric))]
        by_time = sorted(measured, key=lambda run: str(run.metrics.get("finished", "")))
        last = {str(run.metrics.get("seed", run.settings.get("seed"))): run for run in by_time}
        self.counted = measured if is_time(metric) else list(last.values())
        self.repeats = [run for run in measured if run not in self.counted]
        self.values = [run.value(metric) for run in self.counted]
        self.mean = statistics.mean(self.values) if self.values else math.nan
        self.deviation = statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def is_time(metric: str) -> bool:
    """Does it depend on the hardware?"""
    return "second" in metric


def best_first(value: float, metric: str = "val_accuracy") -> float:
    """The key to sort by: NaN last."""
    lower_is_better = metric.endswith(("cross_entropy", "seconds", "epochs", "parameters"))
    return math.inf if math.isnan(value) else value if lower_is_better else -value


def read_metrics(path: Path) -> dict[str, Any]:
    """A `metrics.json`; empty if it is no dictionary, and so no run's.

    Raises:
        UserError: it cannot be read.
    """
    content = read(path, json.loads)
    return content if isinstance(content, dict) else {}


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What a text file holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def read_run(folder: Path) -> Run:
    """What there is to know about a job of a sweep; its settings are its overrides, but for `sweep.…`."""
    damage = []

    def part(name: str, parse: Callable[[str], Any], kind: type) -> Any:
        try:
            content = read(folder / name, parse) if (folder / name).exists() else None
        except UserError as error:
            damage.append(str(error))
            content = None
        return content if isinstance(content, kind) else kind()

    metrics, note = part("metrics.json", json.loads, dict), ""
    status = "done" if metrics else "damaged" if damage else "cut off"
    lines = part(".hydra/overrides.yaml", yaml.safe_load, list) or metrics.get("overrides")
    pairs = (str(line).partition("=") for line in lines) if isinstance(lines, list) else ()
    settings = {key: value for key, _, value in pairs if not key.startswith("sweep.") and key != "classes"}
    for name, meaning in [("pruned", "pruned"), ("error", "failed")]:
        if status == "cut off" and (folder / f"{name}.txt").exists():
            status, note = meaning, part(f"{name}.txt", str.strip, str)
    return Run(folder, settings, metrics, status, " ".join([note, *damage]).strip())


def read_sweep(folder: Path) -> list[Run]:
    """All jobs of a sweep that were begun, in order; hydra.sweep.subdir may give them other names than numbers."""
    names = [path.parent.name for path in folder.glob("*/.hydra")]
    return [read_run(folder / name) for name in sorted(names, key=lambda name: (name.isdigit(), len(name), name))]


def grouped(runs: Sequence[Run], metric: str, alike: Callable[[Run], Any] = lambda run: None) -> list[Group]:
    """Runs that differ only by seed, and are `alike`, together: the best mean first, those without a value last."""
    together: dict[tuple, tuple[dict[str, str], list[Run]]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        together.setdefault((frozenset(settings.items()), alike(run)), (settings, []))[1].append(run)
    groups = [Group(settings, members, metric) for settings, members in together.values()]
    return sorted(groups, key=lambda group: best_first(group.mean, metric))


def varied(groups: Sequence[Run | Group]) -> list[str]:
    """The settings that are not the same in all runs or groups.

    Where different classes are built, a setting that only one of them has is named by the class alone.
    """
    settings, keys = [group.settings for group in groups], []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = {one[key] for one in settings if key in one}
        having, lacking = ({_builder(key, one) for one in settings if (key in one) == has} for has in (True, False))
        if len(values) > 1 or having & lacking or (lacking and key.endswith("_target_")):
            keys.append(key)
    return keys


def _builder(key: str, settings: dict[str, str]) -> str:
    """The class or function that takes this setting."""
    section = key.rpartition(".")[0]
    return settings.get(f"{section}._target_") or (_builder(section, settings) if section else "")


def aligned(table: Mapping[str, Sequence[str]]) -> str:
    """Columns, by their heads, as lines of text."""
    columns = [[head, *cells] for head, cells in table.items()]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True))


def number(text: str) -> float:
    """Infinity for what is none."""
    try:
        return float(text) if math.isfinite(float(text)) else math.inf
    except ValueError:
        return math.inf


def short(value: str) -> str:
    """A number with four digits."""
    return f"{number(value):.4g}" if len(value) >= 8 and math.isfinite(number(value)) else value
