"""Figures of runs: accuracy against epoch, and what a sweep has found."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from cifarnet.records.tables import Group, number, short
from cifarnet.system import files

TRAIN, VAL = "#0969da", "#d1570a"
PANELS = 3  # in a row


def save(figure: Figure, path: Path) -> None:
    """Into an image file of the kind that its name says.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib knows no such kind.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
    files.write(path, content.getbuffer())


def accuracy(history: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy against epoch, train and validation. One row an epoch, with the keys of `Classifier`'s metrics."""
    axis = Figure(figsize=(8, 4.5), dpi=150).add_axes((0.09, 0.12, 0.89, 0.8))  # faster than a layout
    for key, name, colour in [("train/accuracy", "train", TRAIN), ("val/accuracy", "validation", VAL)]:
        if values := {row["epoch"]: row[key] for row in history if key in row}:
            label = f"{name}, last {list(values.values())[-1]:.1%}"
            axis.plot(values.keys(), values.values(), "o-", markersize=3.5, color=colour, label=label)
    if values:  # of validation
        best = max(values, key=values.get)
        label = f"best {values[best]:.1%}, epoch {best}"
        axis.plot(best, values[best], "o", markersize=9, fillstyle="none", color=VAL, label=label)
    axis.set(xlabel="epoch", ylabel="accuracy", title="Accuracy against epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, loc="lower right")
    return axis.figure


def sweep(groups: Sequence[Group], keys: Sequence[str]) -> Figure:
    """Validation accuracy against what was swept: a panel for each setting.

    Args:
        groups: of any order; those without an accuracy are left out.
        keys: the settings that vary.
    """
    groups = [group for group in groups if math.isfinite(group.mean)]
    columns = min(len(keys), PANELS)
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(max(8, 4 * columns), 1 + 3.5 * rows), dpi=150, layout="constrained")
    figure.suptitle(f"Validation accuracy, {len(groups)} settings")
    if not groups:
        return figure
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        _panel(axis, groups, key, alone=len(keys) == 1)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation accuracy")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _panel(axis: Axes, groups: Sequence[Group], key: str, alone: bool) -> None:
    """A point for each group: with its deviation, numbers joined, if nothing else varies; else the best ringed."""
    levels = {group.settings.get(key, "") for group in groups}
    levels = sorted(levels, key=lambda level: (number(level), level))  # what is no number last
    places = dict(zip(levels, _places(axis, levels), strict=True))
    points = np.array([(places[group.settings.get(key, "")], group.mean, group.deviation) for group in groups])
    axis.set_xlabel(key)
    axis.grid(alpha=0.25)
    if alone:
        x, means, deviations = points[points[:, 0].argsort()].T
        kind = "o-" if math.isfinite(number(levels[-1])) else "o"
        axis.errorbar(x, means, yerr=np.nan_to_num(deviations), fmt=kind, color=VAL, capsize=3)
    else:
        x, means, _ = points.T
        axis.plot(x, means, "o", color=VAL, alpha=0.6)
        axis.plot(x[means.argmax()], means.max(), "o", markersize=11, fillstyle="none", color=VAL)


def _places(axis: Axes, levels: Sequence[str]) -> Sequence[float]:
    """Where a setting's sorted values lie on the x axis: evenly, or, if all are numbers, there (logarithmic for a wide
    range), with ticks at the values where there is room for them, else at round numbers.
    """
    numbers, labels = [number(level) for level in levels], [short(level) for level in levels]
    room = axis.bbox.width / 14  # letters beside each other
    if not math.isfinite(numbers[-1]):
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("  ".join(labels)) > room else {}
        axis.set_xticks(range(len(levels)), labels, **slanted)
        axis.set_xlim(-0.5, len(levels) - 0.5)
        return range(len(levels))
    decades = math.log10(numbers[-1] / numbers[0]) if numbers[0] > 0 else 0
    gaps = np.diff(np.log10(numbers) if decades >= 1 else numbers)
    if decades >= 1:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    if max(map(len, labels)) * gaps.sum() <= room * gaps.min(initial=np.inf):
        axis.set_xticks(numbers, labels)
    return numbers
