"""Figures of runs: accuracy against epoch, what a sweep has found, groups beside each other."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from cifarnet.runs.tables import short

TRAIN, VAL = "#0969da", "#d1570a"
PANELS = 3  # in a row
LETTER = 14  # its width, in pixels

Results = Sequence[tuple[Mapping[str, str], float, float]]  # of a sweep: settings, mean accuracy, its deviation


def save(figure: Figure, path: Path) -> None:
    """Into an image file of the kind that its name says, under a temporary name first.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib knows no such kind.
    """
    temporary = Path(f"{path}.tmp")
    try:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def accuracy(history: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy against epoch, train and validation. One row an epoch, with the keys of `Classifier`'s metrics."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axis = figure.subplots()
    for key, name, colour in [("train/accuracy", "train", TRAIN), ("val/accuracy", "validation", VAL)]:
        rows = [row for row in history if key in row]
        if not rows:
            continue
        epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
        axis.plot(epochs, values, "o-", markersize=3.5, color=colour, label=f"{name}, last {values[-1]:.1%}")
        if key == "val/accuracy":
            best = max(values)
            label = f"best {best:.1%}, epoch {epochs[values.index(best)]}"
            axis.plot(epochs[values.index(best)], best, "o", markersize=9, fillstyle="none", color=colour, label=label)
    axis.set(xlabel="epoch", ylabel="accuracy", title="Accuracy against epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, loc="lower right")
    return figure


def sweep(results: Results, keys: Sequence[str]) -> Figure:
    """Validation accuracy against what was swept: a panel for each setting.

    Args:
        results: settings, mean and standard deviation of the accuracy (NaN where there is none), in any order.
        keys: the settings that vary.
    """
    results = [result for result in results if math.isfinite(result[1])]
    columns = min(len(keys), PANELS)
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(max(8, 4 * columns), 1 + 3.5 * rows), dpi=150, layout="constrained")
    figure.suptitle(f"Validation accuracy, {len(results)} settings")
    if not results:
        return figure
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        _panel(axis, results, key, alone=len(keys) == 1)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation accuracy")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _panel(axis: Axes, results: Results, key: str, alone: bool) -> None:
    """A point for each result: with its deviation, numbers joined, if nothing else varies; else the best ringed."""
    results = sorted(results, key=lambda result: (_number(result[0].get(key, "")), result[0].get(key, "")))
    texts, means = [settings.get(key, "") for settings, _, _ in results], [mean for _, mean, _ in results]
    levels = list(dict.fromkeys(texts))
    positions = [_number(level) for level in levels]
    numeric = all(map(math.isfinite, positions))
    if not numeric:
        positions = [float(index) for index in range(len(levels))]
    (_number_ticks if numeric else _text_ticks)(axis, positions, [short(level) for level in levels])
    axis.set_xlabel(key)
    axis.grid(alpha=0.25)
    places = [positions[levels.index(text)] for text in texts]
    if alone:
        deviations = np.nan_to_num([deviation for _, _, deviation in results])
        axis.errorbar(places, means, yerr=deviations, fmt="o-" if numeric else "o", color=VAL, capsize=3)
    else:
        best = int(np.argmax(means))
        axis.plot(places, means, "o", color=VAL, alpha=0.6)
        axis.plot(places[best], means[best], "o", markersize=11, fillstyle="none", color=VAL)


def _number(value: str) -> float:
    """Infinity for what is none."""
    try:
        return float(value)
    except ValueError:
        return math.inf


def _text_ticks(axis: Axes, positions: list[float], labels: list[str]) -> None:
    """Slanted, where there is no room for them side by side."""
    crowded = len("  ".join(labels)) > axis.bbox.width / LETTER
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(positions, labels, **slanted)
    axis.set_xlim(-0.5, len(labels) - 0.5)


def _number_ticks(axis: Axes, positions: list[float], labels: list[str]) -> None:
    """At the values, where there is room for them; else at round numbers. Logarithmic for a wide range."""
    decades = math.log10(max(positions) / min(positions)) if min(positions) > 0 else 0
    gaps = np.diff(np.log10(positions) if decades >= 1 else positions)
    if decades >= 1:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    if max(map(len, labels)) * gaps.sum() <= axis.bbox.width / LETTER * gaps.min(initial=np.inf):
        axis.set_xticks(positions, labels)


def comparison(groups: Sequence[tuple[str, Sequence[float], float]], metric: str, percent: bool) -> Figure:
    """One row a group: its runs as dots, and their mean with its 95 % confidence interval.

    Args:
        groups: title, the runs' values, and half the interval's width (NaN where there is none).
        metric: the name of the values.
        percent: they are shares, from 0 to 1, to be written as percentages.
    """
    lines = sum(title.count("\n") + 2 for title, _, _ in groups)
    figure = Figure(figsize=(8, 1.2 + 0.22 * lines), dpi=150, layout="constrained")
    axis = figure.subplots()
    for row, (_, values, margin) in enumerate(groups):
        axis.plot(values, [row] * len(values), "o", color=TRAIN, alpha=0.5, label="" if row else "runs")
        mean, label = np.mean(values), "" if row else "mean, 95 % interval"
        width = None if np.isnan(margin) else margin
        axis.errorbar(mean, row + 0.2, xerr=width, fmt="D", color=VAL, markersize=5, capsize=4, label=label)
    axis.set_yticks(range(len(groups)), [title for title, _, _ in groups])
    axis.set(ylim=(len(groups) - 0.4, -0.6), xlabel=metric, title=f"{metric.capitalize()} by group")
    if percent:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
