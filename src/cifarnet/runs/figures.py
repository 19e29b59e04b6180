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
    """Validation accuracy against what was swept: one setting, a line; two, a heat map where most of its cells are
    filled; else a panel for each setting, with a point for each result and a ring around the best.

    Args:
        results: settings, mean and standard deviation of the accuracy (NaN where there is none), in any order.
        keys: the settings that vary.
    """
    results = [result for result in results if np.isfinite(result[1])]
    columns = min(len(keys), PANELS)
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(max(8, 4 * columns), 1 + 3.5 * rows), dpi=150, layout="constrained")
    figure.suptitle(f"Validation accuracy, {len(results)} settings")
    if not results:
        return figure
    if len(keys) == 2 and 2 * len(results) >= math.prod(len(_levels(results, key)) for key in keys):
        _heat_map(figure, results, *keys)
        return figure
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        (_line if len(keys) == 1 else _points)(axis, results, key)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation accuracy")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _levels(results: Results, key: str) -> list[str]:
    """The values of a setting, in numerical order if they are numbers."""
    values = {settings.get(key, "") for settings, _, _ in results}
    return sorted(values, key=lambda value: (_number(value), value))


def _number(value: str) -> float:
    """Infinity for what is none."""
    try:
        return float(value)
    except ValueError:
        return math.inf


def _positions(axis: Axes, results: Results, key: str) -> list[float]:
    """Where the results' values of a setting lie on the x axis, logarithmic for a wide range of numbers."""
    levels = _levels(results, key)
    positions, labels = [_number(level) for level in levels], [short(level) for level in levels]
    room = axis.bbox.width / 14  # letters beside each other
    axis.set_xlabel(key)
    axis.grid(alpha=0.25)
    if not np.isfinite(positions).all():
        positions = [float(index) for index, _ in enumerate(levels)]
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("  ".join(labels)) > room else {}
        axis.set_xticks(positions, labels, **slanted)
        axis.set_xlim(-0.5, len(levels) - 0.5)
    else:
        _number_ticks(axis, positions, labels, room)
    places = dict(zip(levels, positions, strict=True))
    return [places[settings.get(key, "")] for settings, _, _ in results]


def _number_ticks(axis: Axes, positions: list[float], labels: list[str], room: float) -> None:
    """At the values, where there is room for them; else at round numbers."""
    decades = math.log10(max(positions) / min(positions)) if min(positions) > 0 else 0
    gaps = np.diff(np.log10(positions) if decades >= 1 else positions)
    fit = max(map(len, labels)) * gaps.sum() <= room * gaps.min(initial=np.inf)
    if decades >= 1:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    if fit:
        axis.set_xticks(positions, labels)


def _line(axis: Axes, results: Results, key: str) -> None:
    results = sorted(results, key=lambda result: _number(result[0].get(key, "")))
    means, deviations = [mean for _, mean, _ in results], [deviation for _, _, deviation in results]
    joined = all(math.isfinite(_number(level)) for level in _levels(results, key))
    places, kind = _positions(axis, results, key), "o-" if joined else "o"
    axis.errorbar(places, means, yerr=np.nan_to_num(deviations), fmt=kind, color=VAL, capsize=3)


def _points(axis: Axes, results: Results, key: str) -> None:
    places, means = _positions(axis, results, key), [mean for _, mean, _ in results]
    best = int(np.argmax(means))
    axis.plot(places, means, "o", color=VAL, alpha=0.6)
    axis.plot(places[best], means[best], "o", markersize=11, fillstyle="none", color=VAL)


def _heat_map(figure: Figure, results: Results, row_key: str, column_key: str) -> None:
    axis, rows, columns = figure.subplots(), _levels(results, row_key), _levels(results, column_key)
    grid = np.full((len(rows), len(columns)), np.nan)
    for settings, mean, _ in results:
        grid[rows.index(settings.get(row_key, "")), columns.index(settings.get(column_key, ""))] = mean
    image = axis.imshow(grid, cmap="viridis", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for row, column in np.argwhere(np.isfinite(grid)):
        value = grid[row, column]
        axis.text(column, row, f"{value:.1%}", ha="center", va="center", color="black" if value > middle else "white")
    axis.set_xticks(range(len(columns)), map(short, columns))
    axis.set_yticks(range(len(rows)), map(short, rows))
    axis.set(xlabel=column_key, ylabel=row_key)
    figure.colorbar(image, format=PercentFormatter(1.0))


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
