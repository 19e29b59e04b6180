"""Figures of an evaluation: reliability, risk and coverage, robustness, histograms of scores, a map of features."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import PercentFormatter

from cifarnet.errors import printable
from cifarnet.inference.figures import BARS, MANY, grid, heat_map
from cifarnet.records.figures import panel

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

    from cifarnet.data import Split

GAP = "#d1570a"
CELLS = 14  # the map of the features has at most one thumbnail in each cell of a grid with this many columns


def reliability(panels: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw accuracy against confidence (equal for a calibrated network), and the fraction of images in each bin.

    Args:
        panels: bins, as returned by `metrics.bins`, by title.
    """
    figure = Figure(figsize=(1 + 4 * len(panels), 5.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (title, bins), (upper, lower) in zip(panels.items(), axes.T, strict=True):
        keys = ("from", "to", "images", "confidence", "accuracy")
        left, right, images, confidence, accuracy = np.array([[row[key] for key in keys] for row in bins]).T
        width, filled = right - left, images > 0
        upper.bar(left, accuracy, width, align="edge", color=BARS, alpha=0.75, label="accuracy")
        upper.plot([0, 1], [0, 1], "--", color="gray", label="calibrated")
        upper.vlines(confidence[filled], confidence[filled], accuracy[filled], color=GAP, linewidth=2.5, label="gap")
        upper.set(title=title, xlim=(0, 1), ylim=(0, 1))
        lower.bar(left, images / images.sum(), width, align="edge", color="gray")
        lower.set(xlabel="confidence")
        for axis in (upper, lower):
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0, 0].set(ylabel="accuracy in the bin")
    axes[1, 0].set(ylabel="fraction of images")
    axes[0, 0].legend(frameon=False, loc="upper left")
    return figure


def risk_coverage(risk: np.ndarray, best: np.ndarray, title: str) -> Figure:
    """Draw the fraction of mistakes among the k most confident of N images, and among k images in the best possible
    order, each float [N], against k / N."""
    figure, axis = panel("coverage: fraction of the images", "risk: fraction of mistakes among them")
    coverage = np.arange(1, len(risk) + 1) / len(risk)
    axis.plot(coverage, risk, color=BARS, label="most confident images first")
    axis.plot(coverage, best, "--", color="gray", label="best possible order")
    axis.set(title=title, xlim=(0, 1), ylim=(0, None))
    axis.legend(frameon=False, loc="upper left")
    return figure


def score_histograms(scores: "Mapping[str, Mapping[str, Tensor]]") -> Figure:
    """Draw the distribution of each score, a panel each, over the test images and over each set of other images.

    The axis ends at quantiles; the outermost bins include all images beyond them.

    Args:
        scores: four scores, [N], by their name, by the name of the set of images, of which one is "test images".
    """
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, scores["test images"], strict=True):
        groups = {printable(label): np.asarray(part[name]) for label, part in scores.items()}
        low, high = np.quantile([np.quantile(values, [0.005, 0.995]) for values in groups.values()], [0, 1])
        for label, values in groups.items():
            axis.hist(values.clip(low, high), 40, (low, high), density=True, histtype="step", label=label)
        axis.set(title=name, yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center")
    return figure


def feature_map(positions: np.ndarray, split: "Split", class_names: Sequence[str]) -> Figure:
    """Draw test images as dots in the color of their class, and some of them as thumbnails in frames of this color.

    Args:
        positions: float [N, 2].
        split: the N images and their labels.
    """
    palette = colormaps["tab10" if len(class_names) <= 10 else "tab20" if len(class_names) <= MANY else "turbo"]
    colors = palette(np.linspace(0, 1, len(class_names)))
    labels, places = split.labels.numpy(), (positions - positions.min(0)) / np.ptp(positions, axis=0).max()
    figure = Figure(figsize=(9.5, 10), dpi=120, layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(class_names):
        axis.plot(*places[labels == number].T, "o", color=colors[number], markersize=3, label=printable(name))
    cells = (CELLS * places).astype(int)
    central = np.hypot(*(CELLS * places - cells - 0.5).T).argsort()
    _, first = np.unique(cells[central], axis=0, return_index=True)
    for number in central[first].tolist():  # in each cell of a grid, the image nearest to its center
        pixels = split.images[number].permute(1, 2, 0).numpy()
        thumbnail = OffsetImage(pixels, zoom=22 / len(pixels), interpolation="nearest")
        frame = {"edgecolor": colors[labels[number]], "linewidth": 1.5}
        axis.add_artist(AnnotationBbox(thumbnail, places[number], pad=0.1, bboxprops=frame))
    if len(class_names) <= MANY:
        figure.legend(frameon=False, loc="outside upper center", ncols=5, markerscale=2)
    axis.set_aspect("equal")
    axis.axis("off")
    return figure


def robustness(table: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw the accuracy under each corruption (a row) at each severity, and their mean, as a heat map."""
    fractions = np.array([[*row, np.mean(row)] for row in table.values()])
    severities = [f"severity {severity}" for severity in range(1, fractions.shape[1])]
    return heat_map(fractions, list(table), [*severities, "mean"], title, decimals=1)


def severities(images: "Mapping[str, Tensor]") -> Figure:
    """Draw an image under each corruption (a row) at each severity.

    Args:
        images: uint8 [severities, 3, H, W] by the name of the corruption.
    """
    captions = [(f"{name} {number}", "black") for name, row in images.items() for number in range(1, len(row) + 1)]
    columns = max(map(len, images.values()))
    return grid([image for row in images.values() for image in row], captions, "Corruptions and severities", columns)
