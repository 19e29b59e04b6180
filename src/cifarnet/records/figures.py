"""Figures of runs: accuracy against epoch, the results of a sweep, and a comparison of groups."""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from cifarnet.errors import printable
from cifarnet.records.tables import Group, differences, parse_number
from cifarnet.system import files

TRAIN, VAL = "#0969da", "#d1570a"
LARGEST = 1e100  # larger numbers are drawn as categories, because matplotlib's limits would overflow


def save(figure: Figure, path: Path) -> None:
    """Write an image file, whose suffix determines the format.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib does not support the format.
    """
    content = io.BytesIO()
    with plain_text(figure):
        figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
    files.write(path, content.getbuffer())


@contextlib.contextmanager
def plain_text(figure: Figure) -> Iterator[None]:
    """Draw a figure without reading its texts as mathematics: they contain names that users have chosen."""
    for text in figure.findobj(Text):
        cast("Text", text).set(parse_math=False, usetex=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Glyph .* missing from font.*")
        yield


def accuracy(history: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw training and validation accuracy against epoch.

    Args:
        history: rows of metrics in any order, with the epoch and the keys of `Classifier`'s metrics.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150)
    axis = figure.add_axes((0.13, 0.12, 0.85, 0.8))  # faster than a layout
    for key, name, color in [("train/accuracy", "train", TRAIN), ("val/accuracy", "validation", VAL)]:
        points = sorted((row["epoch"], row[key]) for row in history if row.get(key) is not None)
        if points:
            epochs, values = np.array(points, dtype=float).T
            label = f"{name}: last {values[-1]:.1%}, best {values.max():.1%} (epoch {epochs[values.argmax()]:.4g})"
            axis.plot(epochs, values, "o-", markersize=3.5, color=color, label=label)
    axis.set(xlabel="epoch", ylabel="accuracy", title="Accuracy against epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _simplify(axis)
    axis.legend(frameon=False, loc="lower right")
    return figure


def comparison(groups: Sequence[Group]) -> Figure:
    """Draw the runs and the mean of each group, with its 95% confidence interval.

    The labels show the first three settings that differ.
    """
    from cifarnet.records.significance import interval  # scipy takes a second to import

    shown = list(differences(groups).items())[:3]
    labels = []
    for column, group in enumerate(groups):
        settings = [f"{key}={values[column]}" for key, values in shown]
        labels.append(printable("\n".join([f"{group.label}  {group.name}", f"n = {len(group.values)}", *settings])))
    longest = max(len(line) for label in labels for line in label.splitlines())
    width = len(groups) * max(2.5, 0.09 * longest)  # inches, so that the labels do not overlap
    figure = Figure(figsize=(min(max(8, width), 400), 5), dpi=150, layout="constrained")  # PNG: up to 65,535 pixels
    axis = figure.subplots()
    widths = [interval([*group.by_fold.values()] or group.values, group.overlap) for group in groups]
    _draw(axis, labels, groups, widths)
    if "accuracy" in groups[0].metric:
        low, high = axis.get_ylim()
        axis.set_ylim(max(0, low), min(1, high))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def sweep(groups: Sequence[Group], keys: Sequence[str]) -> Figure:
    """Draw the runs and the mean of each group against each setting of a sweep, in one panel per setting.

    Args:
        groups: groups in any order, of which at least one has an accuracy. Groups without an accuracy are left out.
        keys: the settings that vary.
    """
    groups = [group for group in groups if group.values]
    figure = Figure(figsize=(max(8, 4 * len(keys)), 4.5), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=True):
        _draw(axis, _place(axis, [printable(group.settings.get(key, "")) for group in groups]), groups)
        axis.set_xlabel(printable(key))
        axis.label_outer()
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def panel(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure with one panel."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    _simplify(axis)
    return figure, axis


def _place(axis: Axes, values: Sequence[str]) -> Sequence[float | str]:
    """Return the x position of each value: numbers (on a logarithmic axis if they span a decade) or categories."""
    numbers = [parse_number(value) for value in values]
    if all(abs(number) < LARGEST for number in numbers):
        if 0 < 10 * min(numbers) <= max(numbers):
            axis.set_xscale("log")
            axis.xaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())  # not as mathematics
        if len(set(values)) <= 8 and max(map(len, values)) <= 8:
            ticks = dict(zip(numbers, values, strict=True))
            axis.set_xticks([*ticks], [*ticks.values()])
            axis.minorticks_off()
        return numbers
    axis.xaxis.update_units(sorted(set(values)))
    for label in axis.get_xticklabels():
        label.set(rotation=30, ha="right", rotation_mode="anchor")
    return values


def _draw(axis: Axes, x: Sequence[float | str], groups: Sequence[Group], intervals: Any = None) -> None:
    """Draw the value of each run as a dot and the mean of each group as a diamond with its interval."""
    sizes, values = [len(group.values) for group in groups], [value for group in groups for value in group.values]
    axis.plot(np.repeat(x, sizes), values, "o", color=TRAIN, alpha=0.5, label="runs")
    if intervals or max(sizes) > 1:
        means, label = [group.mean for group in groups], "mean, 95% interval" if intervals else "mean"
        axis.errorbar(x, means, yerr=intervals, fmt="D", color=VAL, capsize=4, label=label)
    axis.set_ylabel(groups[0].metric.replace("_", " "))
    if "accuracy" in groups[0].metric:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _simplify(axis)


def _simplify(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
