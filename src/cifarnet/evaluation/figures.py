"""Figures of an evaluation: reliability diagrams, risk-coverage curves and robustness tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cifarnet.inference.figures import grid, heat_map
from cifarnet.records.figures import panel

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

BARS, GAP = "#0969da", "#d1570a"


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
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_formatter(PercentFormatter(1.0))
    axis.legend(frameon=False, loc="upper left")
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
