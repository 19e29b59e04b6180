"""Figures of an evaluation: reliability diagrams and robustness tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

BARS, GAP = "#0969da", "#d1570a"


def reliability(panels: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw accuracy against confidence, which are equal in a calibrated network, and the number of images in each bin.

    Args:
        panels: bins by title, as `metrics.bins` returns them.
    """
    figure = Figure(figsize=(1 + 4 * len(panels), 5.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (title, bins), (upper, lower) in zip(panels.items(), axes.T, strict=True):
        keys = ("from", "to", "images", "confidence", "accuracy")
        left, right, images, confidence, accuracy = np.array([[row[key] for key in keys] for row in bins]).T
        width, filled = right - left, images > 0
        upper.bar(left, accuracy, width, align="edge", color=BARS, alpha=0.75, label="accuracy")
        upper.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
        upper.vlines(confidence[filled], confidence[filled], accuracy[filled], color=GAP, linewidth=2.5, label="gap")
        upper.set(title=title, xlim=(0, 1), ylim=(0, 1))
        lower.bar(left, images / images.sum(), width, align="edge", color="grey")
        lower.set(xlabel="confidence")
        for axis in (upper, lower):
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0, 0].set(ylabel="accuracy in the bin")
    axes[1, 0].set(ylabel="share of images")
    axes[0, 0].legend(frameon=False, loc="upper left")
    return figure


def robustness(table: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw the accuracy under each corruption (a row) at each severity, and their mean, as a heat map."""
    grid = np.array([[*row, np.mean(row)] for row in table.values()])
    severities = grid.shape[1] - 1
    figure = Figure(figsize=(7.5, 1.6 + 0.36 * len(table)), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.axvline(severities - 0.5, color=axis.get_facecolor(), linewidth=4)
    for (row, column), value in np.ndenumerate(grid):
        axis.text(column, row, f"{value:.1%}", ha="center", va="center", color="black" if value > 0.55 else "white")
    axis.set_xticks(range(severities + 1), [*map(str, range(1, severities + 1)), "mean"])
    axis.set_yticks(range(len(table)), list(table))
    axis.set(xlabel="severity", title=title)
    return figure


def severities(images: Mapping[str, "Tensor"]) -> Figure:
    """Draw an image under each corruption (a row) at each severity.

    Args:
        images: uint8 [severities, 3, H, W] by the name of the corruption.
    """
    import torch
    from torchvision.utils import make_grid

    rows = list(images.values())
    count, _, height, width = rows[0].shape
    figure = Figure(figsize=(6, 0.3 + 0.95 * len(rows)), dpi=120, layout="constrained")
    axis = figure.subplots()
    grid = make_grid(torch.cat(rows), nrow=count, pad_value=255)
    axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_xticks([(width + 2) * (column + 0.5) for column in range(count)], [*map(str, range(1, count + 1))])
    axis.set_yticks([(height + 2) * (row + 0.5) for row in range(len(rows))], list(images))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="severity")
    return figure
