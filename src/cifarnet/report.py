"""Figures for people: predictions, curves, the confusion matrix, sweeps, comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

if TYPE_CHECKING:  # takes seconds to import: sweeps and comparisons are drawn without
    from torch import Tensor

RIGHT, WRONG = "#1a7f37", "#cf222e"
TRAIN, VAL = "#0969da", "#d1570a"

Results = Sequence[tuple[Mapping[str, str], float, float]]  # of a sweep: settings, mean accuracy, its deviation


def predictions(
    images: "Tensor", labels: "Tensor", predicted: "Tensor", class_names: Sequence[str], columns: int = 8
) -> Figure:
    """A grid of pictures with predicted and true class, mistakes in red.

    Shapes: images uint8 [N, 3, H, W]; labels and predicted int64 [N].
    """
    right = int((labels == predicted).sum())
    captions = [
        (class_names[guess], RIGHT) if label == guess else (f"✗ {class_names[guess]}\n(is {class_names[label]})", WRONG)
        for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    return _grid(images, captions, f"Predictions on test pictures: {right} of {len(images)} right", columns)


def mistakes(
    images: "Tensor",
    labels: "Tensor",
    predicted: "Tensor",
    confidence: "Tensor",
    class_names: Sequence[str],
    columns: int = 5,
) -> Figure:
    """Wrongly classified pictures with predicted class, its probability, and the true class.

    Shapes: images uint8 [N, 3, H, W]; labels and predicted int64 [N]; confidence [N], from 0 to 1.
    """
    captions = [
        (f"{class_names[guess]} {sure:.1%}\n(is {class_names[label]})", WRONG)
        for label, guess, sure in zip(labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    ]
    return _grid(images, captions, "The most confident mistakes", columns)


def _grid(images: "Tensor", captions: Sequence[tuple[str, str]], title: str, columns: int) -> Figure:
    """Pictures, each under its caption in a colour."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.75 * rows + 0.5), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, (caption, colour) in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(caption, fontsize=9, color=colour)
    return figure


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


def confusion(matrix: "Tensor", class_names: Sequence[str]) -> Figure:
    """A confusion matrix, int64 [num_classes, num_classes], as shares of the true class (a row)."""
    counts = matrix.double()
    share = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    size = 2.5 + 0.5 * len(class_names)
    figure = Figure(figsize=(size + 0.5, size), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    axis.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, class_names)
    axis.set(xlabel="predicted", ylabel="true", title="Confusion matrix, % of each true class")
    if len(class_names) <= 20:  # more would be unreadable
        for row, column in np.ndindex(*share.shape):
            percent = round(100 * share[row, column])
            if percent > 0:
                axis.text(column, row, percent, ha="center", va="center", color="white" if percent > 50 else "black")
    return figure


def reliability(panels: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Accuracy against confidence, which are equal in a calibrated network, and how many images each bin holds.

    Args:
        panels: title -> bins, as of `metrics.bins`.
    """
    figure = Figure(figsize=(1 + 4 * len(panels), 5.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (title, bins), (above, below) in zip(panels.items(), axes.T, strict=True):
        left, width = [row["from"] for row in bins], bins[0]["to"] - bins[0]["from"]
        images = np.array([row["images"] for row in bins])
        filled = [row for row in bins if row["images"]]
        above.bar(
            left, [row["accuracy"] for row in bins], width, align="edge", color=TRAIN, alpha=0.75, label="accuracy"
        )
        above.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
        confidence, right = ([row[key] for row in filled] for key in ("confidence", "accuracy"))
        above.vlines(confidence, confidence, right, color=VAL, linewidth=2.5, label="gap")
        above.set(title=title, xlim=(0, 1), ylim=(0, 1))
        below.bar(left, images / images.sum(), width, align="edge", color="grey")
        below.set(xlabel="confidence")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0, 0].set(ylabel="accuracy in the bin")
    axes[1, 0].set(ylabel="share of images")
    axes[0, 0].legend(frameon=False, loc="upper left")
    return figure


def robustness(table: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Accuracies from 0 to 1 of each corruption (a row) at growing severity, and their mean, as a heat map."""
    grid = np.array([[*row, np.mean(row)] for row in table.values()])
    severities = grid.shape[1] - 1
    figure = Figure(figsize=(7.5, 1.6 + 0.36 * len(table)), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.axvline(severities - 0.5, color="white", linewidth=4)
    for row, column in np.ndindex(*grid.shape):
        value = grid[row, column]
        axis.text(column, row, f"{value:.1%}", ha="center", va="center", color="black" if value > 0.55 else "white")
    axis.set_xticks(range(severities + 1), [*map(str, range(1, severities + 1)), "mean"])
    axis.set_yticks(range(len(table)), list(table))
    axis.set(xlabel="severity", title=title)
    return figure


def severities(images: Mapping[str, "Tensor"]) -> Figure:
    """What each corruption (a row) makes of a picture, at growing severity: uint8 [severities, 3, H, W] a row."""
    import torch
    from torchvision.utils import make_grid

    rows = list(images.values())
    count, _, height, width = rows[0].shape
    figure = Figure(figsize=(6, 0.3 + 0.95 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.imshow(make_grid(torch.cat(rows), nrow=count, pad_value=255).permute(1, 2, 0), interpolation="nearest")
    axis.set_xticks([(width + 2) * (column + 0.5) for column in range(count)], range(1, count + 1))
    axis.set_yticks([(height + 2) * (row + 0.5) for row in range(len(rows))], list(images))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="severity")
    return figure


def as_image(figure: Figure) -> "Tensor":
    """The figure as pixels, uint8 [3, H, W]."""
    import torch

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def sweep(results: Results, keys: Sequence[str]) -> Figure:
    """Validation accuracy against what was swept: one setting, a line; two, a heat map, or points where most of its
    cells would be empty; more, parallel coordinates.

    Args:
        results: settings, mean and standard deviation of the accuracy (NaN where there is none), in any order.
        keys: the settings that vary.
    """
    results = [result for result in results if np.isfinite(result[1])]
    draw = {1: _line, 2: _heat_map}.get(len(keys), _parallel_coordinates)
    if len(keys) == 2 and 2 * len(results) < math.prod(len(_levels(results, key)) for key in keys):
        draw = _points
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    figure.suptitle(f"Validation accuracy, {len(results)} settings")
    if results:
        draw(figure, results, list(keys))
    return figure


def _levels(results: Results, key: str) -> list[str]:
    """The values of a setting, in numerical order if they are numbers."""
    values = {settings.get(key, "") for settings, _, _ in results}
    return sorted(values, key=lambda value: (_number(value), value))


def short(value: str) -> str:
    """A number with four digits."""
    try:
        return value if len(value) < 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("inf")


def _positions(axis: Axis, levels: list[str]) -> dict[str, float]:
    """Where the values of a setting lie on an axis, which becomes logarithmic for a wide range of numbers."""
    positions = [_number(level) for level in levels]
    if not np.isfinite(positions).all():
        positions = [float(index) for index, _ in enumerate(levels)]
        axis.set_ticks(positions, levels)
    else:
        if min(positions) > 0 and max(positions) / min(positions) >= 10:
            getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        if len(levels) <= 8:  # else round numbers are easier to read
            axis.set_ticks(positions, levels)
            axis.set_minor_locator(NullLocator())
    return dict(zip(levels, positions, strict=True))


def _line(figure: Figure, results: Results, keys: list[str]) -> None:
    axis, levels = figure.subplots(), _levels(results, keys[0])
    by_level = {settings.get(keys[0], ""): (mean, deviation) for settings, mean, deviation in results}
    numeric = all(np.isfinite(_number(level)) for level in levels)
    positions = list(_positions(axis.xaxis, levels).values())
    means, deviations = zip(*(by_level[level] for level in levels), strict=True)
    axis.errorbar(positions, means, yerr=np.nan_to_num(deviations), fmt="o-" if numeric else "o", color=VAL, capsize=3)
    axis.set(xlabel=keys[0], ylabel="validation accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.25)


def _heat_map(figure: Figure, results: Results, keys: list[str]) -> None:
    axis, (rows, columns) = figure.subplots(), (_levels(results, key) for key in keys)
    grid = np.full((len(rows), len(columns)), np.nan)
    for settings, mean, _ in results:
        grid[rows.index(settings.get(keys[0], "")), columns.index(settings.get(keys[1], ""))] = mean
    image = axis.imshow(grid, cmap="viridis", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for row, column in np.argwhere(np.isfinite(grid)):
        value = grid[row, column]
        axis.text(column, row, f"{value:.1%}", ha="center", va="center", color="black" if value > middle else "white")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=keys[1], ylabel=keys[0])
    figure.colorbar(image, format=PercentFormatter(1.0))


def _points(figure: Figure, results: Results, keys: list[str]) -> None:
    axis = figure.subplots()
    places = []
    for side, key in ((axis.xaxis, keys[0]), (axis.yaxis, keys[1])):
        positions = _positions(side, _levels(results, key))
        places.append([positions[settings.get(key, "")] for settings, _, _ in results])
    points = axis.scatter(*places, c=[mean for _, mean, _ in results], cmap="viridis", s=70, edgecolors="black")
    axis.set(xlabel=keys[0], ylabel=keys[1])
    axis.grid(alpha=0.25)
    figure.colorbar(points, format=PercentFormatter(1.0))


def _parallel_coordinates(figure: Figure, results: Results, keys: list[str]) -> None:
    """One line a result; beside it, the share of the variance that each setting explains alone."""
    axis, bars = figure.subplots(1, 2, width_ratios=[3, 1])
    levels = {key: _levels(results, key) for key in keys}
    scores = np.array([mean for _, mean, _ in results])
    colours = colormaps["viridis"]((scores - scores.min()) / (np.ptp(scores) or 1))
    for (settings, _, _), colour in sorted(zip(results, colours, strict=True), key=lambda pair: pair[0][1]):
        heights = [levels[key].index(settings.get(key, "")) / max(len(levels[key]) - 1, 1) for key in keys]
        axis.plot(range(len(keys)), heights, "o-", color=colour, alpha=0.8)
    for place, key in enumerate(keys):
        step = -(-len(levels[key]) // 8)  # a search has a value of its own in every trial
        for index, level in list(enumerate(levels[key]))[::step]:
            axis.annotate(
                short(level), (place, index / max(len(levels[key]) - 1, 1)), (4, 4), textcoords="offset points"
            )
    axis.set_xticks(range(len(keys)), keys, rotation=15)
    axis.set_yticks([])
    scale = ScalarMappable(Normalize(scores.min(), scores.max()), "viridis")
    figure.colorbar(scale, ax=axis, format=PercentFormatter(1.0), location="left")
    bars.barh(keys, [_importance(results, scores, key) for key in keys], color=VAL)
    bars.set(title="variance explained", xlim=(0, 1))
    bars.xaxis.set_major_formatter(PercentFormatter(1.0))
    bars.invert_yaxis()


def _importance(results: Results, scores: np.ndarray, key: str) -> float:
    """How much of the variance of the scores lies between the values of one setting: from 0 to 1.

    Where there are many values, between their quarters.
    """
    values = np.array([settings.get(key, "") for settings, _, _ in results])
    levels = _levels(results, key)
    if len(levels) > 5:
        values = np.array([4 * levels.index(value) // len(levels) for value in values])
    means = np.empty_like(scores)
    for value in np.unique(values):
        means[values == value] = scores[values == value].mean()
    return float(means.var() / scores.var()) if scores.var() else 0.0


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
