"""Runs read from their folders, groups of runs that differ only in the seed or the fold, and tables as text.

A finished run's folder contains `metrics.json`. The folder of a sweep's job contains Hydra's record of its overrides,
and `error.txt` or `pruned.txt` if the job failed or was pruned.
"""

import csv
import functools
import io
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from typeguard import CollectionCheckStrategy, check_type

from cifarnet.config import flat
from cifarnet.errors import UserError, csv_cell
from cifarnet.records.record import Record
from cifarnet.system import files


@dataclass(eq=False)
class Run:
    """A run and its results.

    Attributes:
        settings: the settings that distinguish the run: the overrides of a job, or the part of a config that affects
            its results.
        status: done, failed, pruned, damaged, running or cut off; `note` explains why.
        record: the record of a run that is done, unless it ran on another machine.
        numbers: the results, by their names in `metrics.json`.
    """

    folder: Path
    settings: dict[str, str]
    status: str = "done"
    note: str = ""
    record: Record | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The validation accuracy, from 0 to 1; NaN if the run has none."""
        return self.numbers.get("val_accuracy", math.nan)

    @functools.cached_property
    def fold(self) -> tuple[int, ...]:
        """The number of folds, the seed of the split, and the fold; empty if the run has no folds or no record."""
        settings = flat(self.record.resolved) if self.record else {}
        names = ("data.folds", "data.split_seed", "data.fold")
        return tuple(int(settings[name]) for name in names) if names[0] in settings else ()


@dataclass(eq=False)
class Group:
    """Runs that differ only in the seed or the fold, with mean and standard deviation of a metric (NaN for too few
    values).

    If several runs have the same seed and fold, only the run that finished last is `counted`. The others are `repeats`,
    because they are not independent samples. Times are an exception: they vary between runs with the same seed.

    Attributes:
        label, name, is_baseline: set in comparisons only.
    """

    settings: dict[str, str]
    runs: Sequence[Run]
    metric: str
    label: str = ""
    name: str = ""
    is_baseline: bool = False

    def __post_init__(self) -> None:
        measured = [run for run in self.runs if self.metric in run.numbers]
        measured_by_date = sorted(measured, key=lambda run: run.record.finished if run.record else "")
        seeds = [str(run.record.seed if run.record else run.settings.get("seed")) for run in measured_by_date]
        last = {(seed, run.fold): run for seed, run in zip(seeds, measured_by_date, strict=True)}
        self.counted = measured if is_time(self.metric) else list(last.values())
        self.records = [run.record for run in self.counted if run.record]
        self.repeats = [run for run in measured if run not in self.counted]
        self.values = [run.numbers[self.metric] for run in self.counted]
        self.mean = statistics.mean(self.values) if self.values else math.nan
        self.deviation = statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @functools.cached_property
    def by_fold(self) -> dict[tuple[int, ...], float]:
        """The value of each fold, a mean over its seeds; empty if there are no folds, or for times."""
        values: dict[tuple[int, ...], list[float]] = {}
        for run, value in zip(self.counted, self.values, strict=True):
            values.setdefault(() if is_time(self.metric) else run.fold, []).append(value)
        return {} if () in values else {fold: statistics.mean(found) for fold, found in values.items()}

    @property
    def overlap(self) -> float:
        """The number of validation images of a fold divided by its training images; 0 if the metric is not measured on
        the validation images. See `significance.paired`.

        It is the same for runs on a subset of the training images: the subsets of all folds overlap as the folds do.
        """
        is_validation = self.metric.startswith("val_")
        return next((1 / (folds - 1) for folds, *_ in self.by_fold if is_validation), 0.0)

    @property
    def images(self) -> int | None:
        """The number of images from which an accuracy was computed, over all runs; None if it is unknown."""
        split = "val" if self.metric.startswith("val_") else "test"
        return sum(record.data[split] for record in self.records) or None

    def result(self) -> str:
        """Return the mean and standard deviation as text, which is empty if there is no value."""
        spread = f" ± {number(self.deviation, self.metric, images=self.images)}" if len(self.values) > 1 else ""
        mean = number(self.mean, self.metric, images=self.images)
        return f"{mean}{spread}{unit(self.metric)}" if self.values else ""


def is_time(metric: str) -> bool:
    """Whether a metric depends on the hardware."""
    return "second" in metric


def decimals(images: int | None) -> int:
    """Return how many decimals of a percentage of images are meaningful: at most two, which None also gives."""
    return 2 if images is None else min(2, max(0, math.ceil(math.log10(max(1, images))) - 2))


def percent(fraction: float, images: int | None) -> str:
    """Return a fraction of a number of images as text."""
    return f"{fraction:.{decimals(images)}%}"


def number(value: float, metric: str, sign: str = "", images: int | None = None) -> str:
    """Return a value of a metric as text, without its unit. Accuracies are in percent, see `decimals`."""
    factor, digits = (100, decimals(images)) if "accuracy" in metric else (1, 2 if is_time(metric) else 4)
    return f"{factor * value:{sign},.{digits}f}"


def unit(metric: str) -> str:
    return "%" if "accuracy" in metric else ""


def sort_key(value: float, metric: str = "val_accuracy") -> float:
    """Return a key that sorts the best value of a metric first and NaN last."""
    higher_is_better = "accuracy" in metric or "per_second" in metric
    return math.inf if math.isnan(value) else -value if higher_is_better else value


def overrides(folder: Path) -> list[str]:
    """Return the overrides that Hydra recorded when a run started; empty if Hydra did not start the run.

    Raises:
        UserError: Hydra's record cannot be read.
    """
    path = folder / ".hydra/overrides.yaml"

    def parse(text: str) -> list[str]:
        found = yaml.load(text, yaml.BaseLoader)  # reads scalars as text, and expands no merge keys
        return check_type(found or [], list[str], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)

    return files.read(path, parse) if path.exists() else []


def read_run(folder: Path) -> Run:
    """Return a job of a sweep. Its settings are its overrides, without those of the sweep itself."""
    settings: dict[str, str] = {}
    try:
        pairs = (line.partition("=") for line in overrides(folder))
        settings = {key: value for key, _, value in pairs if not key.startswith("sweep.") and key != "classes"}
        if (path := folder / "metrics.json").exists():
            record = Record.read(path)
            return Run(folder, settings, record=record, numbers=record.numbers())
        for name, status in [("pruned.txt", "pruned"), ("error.txt", "failed")]:
            if (path := folder / name).exists():
                return Run(folder, settings, status, files.read(path, str.strip))
    except UserError as error:
        return Run(folder, settings, "damaged", str(error))
    return Run(folder, settings, "cut off")


def read_sweep(folder: Path) -> list[Run]:
    """Return all jobs of a sweep that have started, sorted. With hydra.sweep.subdir, their names may not be numbers."""
    names = [path.parent.name for path in folder.glob("*/.hydra")]
    return [read_run(folder / name) for name in sorted(names, key=lambda name: (name.isdigit(), len(name), name))]


def grouped(runs: Sequence[Run], metric: str) -> list[Group]:
    """Group runs that differ only in the seed or the fold. The group with the best mean comes first."""
    members: dict[tuple, list[Run]] = {}
    for run in runs:
        samples = ("seed", "data.fold", "data.split_seed") if "data.fold" in run.settings else ("seed",)
        settings = sorted((name, value) for name, value in run.settings.items() if name not in samples)
        members.setdefault(tuple(settings), []).append(run)
    groups = [Group(dict(settings), members, metric) for settings, members in members.items()]
    return sorted(groups, key=lambda group: sort_key(group.mean, metric))


def letter(number: int) -> str:
    """Return the label of a group: a to z, then aa, ab, …"""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def varied(groups: Sequence[Run | Group]) -> list[str]:
    """Return the settings that differ between runs or groups.

    If runs use different classes, a setting that only one of these classes has is left out: the class implies it.
    """
    settings, keys = [group.settings for group in groups], []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = {one[key] for one in settings if key in one}
        having, lacking = ({_builder(key, one) for one in settings if (key in one) == has} for has in (True, False))
        if len(values) > 1 or having & lacking:
            keys.append(key)
    return keys


def _builder(key: str, settings: dict[str, str]) -> str:
    """Return the class or function that takes a setting, or the object built from a `_target_`, as its argument."""
    section = key.removesuffix("._target_").rpartition(".")[0]
    return settings.get(f"{section}._target_") or (_builder(section, settings) if section else "")


def differences(groups: Sequence[Run | Group]) -> dict[str, list[str]]:
    """Return the settings that differ, with the value of each run or group."""
    return {key: [shorten(group.settings.get(key, "none")) for group in groups] for key in varied(groups)}


def column_table(columns: Mapping[str, Sequence[str]]) -> str:
    """Return a table as text, from the heading and the cells of each column."""
    cells = [[heading, *column] for heading, column in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*cells, strict=True))


def csv_text(rows: Iterable[Mapping[str, object]], columns: Collection[str]) -> str:
    """Return the columns of rows as CSV. Texts that spreadsheets would evaluate as formulas get an apostrophe."""
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: csv_cell(cell) for key, cell in row.items()} for row in rows)
    return content.getvalue()


def row_table(rows: Mapping[str, str]) -> str:
    """Return names and values as text in two columns, between empty lines."""
    width = max(map(len, rows))
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""])


def parse_number(text: str) -> float:
    """Return the number in a text; infinity if it is not a finite number."""
    try:
        return float(text) if math.isfinite(float(text)) else math.inf
    except ValueError:
        return math.inf


def shorten(value: str) -> str:
    """Round a long number to four digits; return any other text unchanged."""
    return f"{parse_number(value):.4g}" if len(value) >= 8 and math.isfinite(parse_number(value)) else value
