"""Runs as their folders tell of them, grouped by what they share, and tables of text.

A run's folder holds `metrics.json` in the end. A sweep's job has Hydra's record of its overrides there from the start,
and `error.txt` or `pruned.txt` where it came to nothing. All that is here reads these files, so that it works just as
well for a sweep that failed, was killed, or ran in several processes.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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


@dataclass
class Group:
    """Runs that differ only by seed."""

    runs: list[Run]
    metric: str
    baseline: bool = False
    label: str = ""

    @property
    def settings(self) -> dict[str, str]:
        return {key: value for key, value in self.runs[0].settings.items() if key != "seed"}

    @cached_property
    def counted(self) -> list[Run]:
        """The runs that have the metric, one a seed: the one that finished last; the others are no further samples.

        Times are another matter: they vary between runs of one seed too.
        """
        runs = [run for run in self.runs if math.isfinite(run.value(self.metric))]
        if is_time(self.metric):
            return runs
        runs.sort(key=lambda run: run.metrics.get("finished", ""))
        return list({run.metrics.get("seed", run.settings.get("seed")): run for run in runs}.values())

    @property
    def repeats(self) -> list[Run]:
        """The runs that are not counted because a later one had their seed."""
        return [run for run in self.runs if math.isfinite(run.value(self.metric)) and run not in self.counted]

    @property
    def values(self) -> list[float]:
        return [run.value(self.metric) for run in self.counted]

    @property
    def mean(self) -> float:
        """NaN where there is no value."""
        return statistics.mean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """The sample standard deviation; NaN for less than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def name(self) -> str:
        names = " / ".join(dict.fromkeys(str(run.metrics.get("name")) for run in self.counted))
        return f"{names} (baseline)" if self.baseline else names


def is_time(metric: str) -> bool:
    """Does it depend on the hardware?"""
    return "second" in metric


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("cross_entropy", "seconds", "epochs", "parameters"))


def best_first(value: float, metric: str = "val_accuracy") -> float:
    """The key to sort by: NaN last."""
    if math.isnan(value):
        return math.inf
    return value if lower_is_better(metric) else -value


def read_metrics(path: Path) -> dict[str, Any]:
    """A `metrics.json`; empty if it is no dictionary, and so no run's.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "Repeat that run, or name the folders of the others."
        raise UserError(f"{path} cannot be read: {error}. {remedy}") from error
    return content if isinstance(content, dict) else {}


def read_run(folder: Path) -> Run:
    """What there is to know about a job of a sweep; its settings are its overrides, but for `sweep.…`."""
    overrides, metrics = folder / ".hydra" / "overrides.yaml", folder / "metrics.json"
    lines = OmegaConf.load(overrides) if overrides.is_file() else []
    pairs = (str(line).partition("=") for line in lines)
    run = Run(folder, {key: value for key, _, value in pairs if not key.startswith("sweep.")})
    if metrics.is_file():
        run.metrics = read_metrics(metrics)
    for note in ("error", "pruned"):
        if (file := folder / f"{note}.txt").is_file():
            setattr(run, note, file.read_text(encoding="utf-8").strip())
    return run


def read_sweep(folder: Path) -> list[Run]:
    """All jobs of a sweep that were begun, in order."""
    numbered = [path.parent for path in folder.glob("*/.hydra") if path.parent.name.isdigit()]
    return [read_run(path) for path in sorted(numbered, key=lambda path: int(path.name))]


def grouped(runs: Sequence[Run], metric: str, alike: Callable[[Run], Any] = lambda run: None) -> list[Group]:
    """Runs that differ only by seed, and are `alike`, together: the best mean first, those without a value last."""
    groups: dict[tuple, Group] = {}
    for run in runs:
        new = Group([], metric)
        same = sorted((key, value) for key, value in run.settings.items() if key != "seed")
        groups.setdefault((*same, alike(run)), new).runs.append(run)
    return sorted(groups.values(), key=lambda group: best_first(group.mean, metric))


def varied(groups: Sequence[Run | Group]) -> list[str]:
    """The settings that are not the same in all runs or groups.

    Where different classes are built, a setting that only one of them has is named by the class alone.
    """
    settings = [group.settings for group in groups]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if _varies(key, settings)]


def _varies(key: str, settings: Sequence[dict[str, str]]) -> bool:
    built: dict[str, set[str | None]] = {}
    for one in settings:
        built.setdefault(_builder(key, one), set()).add(one.get(key))
    if key.endswith("_target_"):
        return len(built) > 1
    present = {one[key] for one in settings if key in one}
    return len(present) > 1 or any(len(values) > 1 for values in built.values())


def _builder(key: str, settings: dict[str, str]) -> str:
    """The class or function that takes this setting."""
    while key:
        key = key.rpartition(".")[0]
        if target := settings.get(f"{key}._target_"):
            return target
    return ""


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def short(value: str) -> str:
    """A number with four digits."""
    try:
        return value if len(value) < 8 else f"{float(value):.4g}"
    except ValueError:
        return value
