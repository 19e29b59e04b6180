"""Runs as the files in their folders tell of them, grouped by what they share, and tables of text.

A run's folder holds `metrics.json` in the end. A sweep's job has Hydra's record of its overrides there from the start,
and `error.txt` or `pruned.txt` where it came to nothing.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cifarnet.errors import UserError


@dataclass(eq=False)
class Run:
    """`settings` is what tells it from others: a job's overrides, or the part of a config that decides its figures.

    `metrics` is its `metrics.json`, `error` its `error.txt`; `pruned` says where a search stopped it.
    """

    folder: Path
    settings: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    pruned: str = ""

    @property
    def status(self) -> str:
        return "done" if self.metrics else "failed" if self.error else "pruned" if self.pruned else "cut off"

    def value(self, metric: str) -> float:
        """A number in `metrics.json`; NaN where there is none."""
        value = self.metrics.get(metric)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

    @property
    def score(self) -> float:
        """Validation accuracy, from 0 to 1; NaN where there is none."""
        return self.value("val_accuracy")


class Group:
    """Runs that differ only by seed, and their values of a metric, with mean and deviation (NaN where there is none).

    Of each seed only the run that finished last is `counted`: the others are no further samples, but `repeats`. Times
    are another matter: they vary between runs of one seed too.
    """

    def __init__(self, runs: Sequence[Run], metric: str) -> None:
        self.runs = runs
        self.settings = _without_seed(runs[0])
        measured = [run for run in runs if math.isfinite(run.value(metric))]
        last = {
            run.metrics.get("seed", run.settings.get("seed")): run
            for run in sorted(measured, key=lambda run: run.metrics.get("finished", ""))
        }
        self.counted = measured if is_time(metric) else list(last.values())
        self.repeats = [run for run in measured if run not in self.counted]
        self.values = [run.value(metric) for run in self.counted]
        self.mean = statistics.mean(self.values) if self.values else math.nan
        self.deviation = statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def _without_seed(run: Run) -> dict[str, str]:
    return {key: value for key, value in run.settings.items() if key != "seed"}


def is_time(metric: str) -> bool:
    """Does it depend on the hardware?"""
    return "second" in metric


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("cross_entropy", "seconds", "epochs", "parameters"))


def best_first(value: float, metric: str = "val_accuracy") -> float:
    """The key to sort by: NaN last."""
    return math.inf if math.isnan(value) else value if lower_is_better(metric) else -value


def read_metrics(path: Path) -> dict[str, Any]:
    """A `metrics.json`; empty if it is no dictionary, and so no run's.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Repeat that run, or name the folders of the others."
        ) from error
    return content if isinstance(content, dict) else {}


def read_run(folder: Path) -> Run:
    """What there is to know about a job of a sweep; its settings are its overrides, but for `sweep.…`."""
    overrides, metrics = folder / ".hydra" / "overrides.yaml", folder / "metrics.json"
    lines = OmegaConf.load(overrides) if overrides.is_file() else []
    pairs = (str(line).partition("=") for line in lines)
    settings = {key: value for key, _, value in pairs if not key.startswith("sweep.")}
    notes = (folder / "error.txt", folder / "pruned.txt")
    error, pruned = (note.read_text(encoding="utf-8").strip() if note.is_file() else "" for note in notes)
    return Run(folder, settings, read_metrics(metrics) if metrics.is_file() else {}, error, pruned)


def read_sweep(folder: Path) -> list[Run]:
    """All jobs of a sweep that were begun, in order."""
    numbers = [int(path.parent.name) for path in folder.glob("*/.hydra") if path.parent.name.isdigit()]
    return [read_run(folder / str(number)) for number in sorted(numbers)]


def grouped(runs: Sequence[Run], metric: str, alike: Callable[[Run], Any] = lambda run: None) -> list[Group]:
    """Runs that differ only by seed, and are `alike`, together: the best mean first, those without a value last."""
    together: dict[tuple, list[Run]] = {}
    for run in runs:
        together.setdefault((frozenset(_without_seed(run).items()), alike(run)), []).append(run)
    groups = [Group(members, metric) for members in together.values()]
    return sorted(groups, key=lambda group: best_first(group.mean, metric))


def varied(groups: Sequence[Run | Group]) -> list[str]:
    """The settings that are not the same in all runs or groups.

    Where different classes are built, a setting that only one of them has is named by the class alone.
    """
    settings = [group.settings for group in groups]
    return [key for key in dict.fromkeys(key for one in settings for key in one) if _varies(key, settings)]


def _varies(key: str, settings: Sequence[dict[str, str]]) -> bool:
    values = {one.get(key) for one in settings}
    if key.endswith("_target_"):
        return len(values) > 1
    builders = {_builder(key, one) for one in settings}
    pairs = {(_builder(key, one), one.get(key)) for one in settings}
    return len(values - {None}) > 1 or len(pairs) > len(builders)  # two values for one class


def _builder(key: str, settings: dict[str, str]) -> str:
    """The class or function that takes this setting."""
    section = key.rpartition(".")[0]
    return settings.get(f"{section}._target_") or (_builder(section, settings) if section else "")


def aligned(table: Mapping[str, Sequence[str]]) -> str:
    """Columns, by their heads, as lines of text."""
    columns = [[head, *cells] for head, cells in table.items()]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True))


def short(value: str) -> str:
    """A number with four digits."""
    try:
        return value if len(value) < 8 else f"{float(value):.4g}"
    except ValueError:
        return value
