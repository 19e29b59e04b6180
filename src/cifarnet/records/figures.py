"""Figures of runs: accuracy against epoch, the results of a sweep, and a comparison of groups."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from cifarnet.records.tables import Group, parse_number, shorten
from cifarnet.system import files

TRAIN, VAL = "#0969da", "#d1570a"
PANELS_PER_ROW = 3


def save(figure: Figure, path: Path) -> None:
    """Write an image file; its suffix decides the format.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib does not know the format.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
    files.write(path, content.getbuffer())


def accuracy(history: Iterable[Mapping[str, float | None]]) -> Figure:
    """Draw training and validation accuracy against epoch.

    Args:
        history: a row for each epoch, with the keys of `Classifier`'s metrics.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150)
    axis = figure.add_axes((0.09, 0.12, 0.89, 0.8))  # faster than a layout
    for key, name, colour in [("train/accuracy", "train", TRAIN), ("val/accuracy", "validation", VAL)]:
        points: Any = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            label = f"{name}, last {points[-1][1]:.1%}"
            axis.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=colour, label=label)
    if points:  # of validation
        epoch, best = max(points, key=lambda point: point[1])
        label = f"best {best:.1%}, epoch {epoch}"
        axis.plot(epoch, best, "o", markersize=9, fillstyle="none", color=VAL, label=label)
    axis.set(xlabel="epoch", ylabel="accuracy", title="Accuracy against epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _simplify(axis, "both")
    if axis.lines:
        axis.legend(frameon=False, loc="lower right")
    return figure


def comparison(groups: Sequence[Group], metric: str, differences: Mapping[str, Sequence[str]]) -> Figure:
    """Draw each run as a dot, in a row for each group, and the mean of the group with its 95 % confidence interval.

    Args:
        differences: the settings that vary, with the value of each group; the first three are shown.
    """
    from cifarnet.records.significance import interval  # scipy takes a second to import

    shown = list(differences.items())[:3]
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(groups) * (2 + len(shown))), dpi=150, layout="constrained")
    axis = figure.subplots()
    titles, is_share = [], "accuracy" in metric
    for row, group in enumerate(groups):
        settings = [f"{key}={values[row]}" for key, values in shown]
        titles.append("\n".join([f"{group.label}  {group.name}, n = {len(group.values)}", *settings]))
        dots = {"alpha": 0.5, "clip_on": False, "label": "" if row else "runs"}
        axis.plot(group.values, [row] * len(group.values), "o", color=TRAIN, **dots)
        half = interval(group.values)
        limits = [group.mean, 1 - group.mean] if is_share else [half, half]  # an accuracy is between 0 and 1
        bars = [[half if math.isnan(half) else min(half, limit)] for limit in limits]
        style = {"fmt": "D", "markersize": 5, "capsize": 4, "clip_on": False}
        label = "" if row else "mean, 95 % interval"
        axis.errorbar(group.mean, row + 0.2, xerr=bars, color=VAL, label=label, **style)
    axis.set_yticks(range(len(groups)), titles)
    name = metric.replace("_", " ")
    axis.set(ylim=(len(groups) - 0.4, -0.6), xlabel=name, title=f"{name.capitalize()} by group")
    if is_share:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlim(max(0, axis.get_xlim()[0]), min(1, axis.get_xlim()[1]))
    _simplify(axis, "x")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _simplify(axis: Axes, grid: Literal["both", "x"]) -> None:
    axis.grid(axis=grid, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def sweep(groups: Sequence[Group], keys: Sequence[str]) -> Figure:
    """Draw validation accuracy against each setting of a sweep, in a panel for each.

    Args:
        groups: in any order; those without an accuracy are left out.
        keys: the settings that vary.
    """
    groups = [group for group in groups if math.isfinite(group.mean)]
    columns = min(len(keys), PANELS_PER_ROW)
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(max(8, 4 * columns), 1 + 3.5 * rows), dpi=150, layout="constrained")
    figure.suptitle(f"Validation accuracy, {len(groups)} settings")
    if not groups:
        return figure
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        _panel(axis, groups, key, is_only_key=len(keys) == 1)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation accuracy")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _panel(axis: Axes, groups: Sequence[Group], key: str, is_only_key: bool) -> None:
    """Draw a point for each group.

    If no other setting varies, the points have error bars, and numbers are joined by a line. Otherwise the best point
    is marked by a ring.
    """
    levels = {group.settings.get(key, "") for group in groups}
    levels = sorted(levels, key=lambda level: (parse_number(level), level))  # numbers first
    places = dict(zip(levels, _places(axis, levels), strict=True))
    points = np.array([(places[group.settings.get(key, "")], group.mean, group.deviation) for group in groups])
    axis.set_xlabel(key)
    axis.grid(alpha=0.25)
    if is_only_key:
        x, means, deviations = points[points[:, 0].argsort()].T
        style = "o-" if math.isfinite(parse_number(levels[-1])) else "o"
        axis.errorbar(x, means, yerr=np.nan_to_num(deviations), fmt=style, color=VAL, capsize=3)
    else:
        x, means, _ = points.T
        axis.plot(x, means, "o", color=VAL, alpha=0.6)
        axis.plot(x[means.argmax()], means.max(), "o", markersize=11, fillstyle="none", color=VAL)


def _places(axis: Axes, levels: Sequence[str]) -> Sequence[float]:
    """Return the positions of the sorted values of a setting on the x axis, and set its scale and ticks.

    Numbers are at their values, on a logarithmic scale if their range is wide; ticks are at the values if their labels
    fit, else at round numbers. Other values are evenly spaced.
    """
    numbers, labels = [parse_number(level) for level in levels], [shorten(level) for level in levels]
    characters = axis.bbox.width / 14  # that fit beside each other
    if not math.isfinite(numbers[-1]):
        fits = len("  ".join(labels)) <= characters
        slanted = {} if fits else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
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
    if max(map(len, labels)) * gaps.sum() <= characters * gaps.min(initial=np.inf):
        axis.set_xticks(numbers, labels)
    return numbers
