"""Figures of an evaluation: reliability diagrams and robustness tables."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cifarnet.inference.figures import is_dark

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

BARS, GAP = "#0969da", "#d1570a"
PAGE, INK, LINE = "#0d1117", "#e6edf3", "#8b949e"  # of the page in dark mode
DARK = dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAGE) | dict.fromkeys(
    ("text.color", "axes.labelcolor"), INK
)
DARK |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), LINE)


def light_and_dark(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """A figure as PNG files, for a page in light and in dark mode."""

    def png() -> bytes:
        content = io.BytesIO()
        draw().savefig(content)  # ticks take their colours only now
        return content.getvalue()

    with rc_context(DARK):
        dark = png()
    return png(), dark


def reliability(panels: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Accuracy against confidence, which are equal in a calibrated network, and how many images each bin holds.

    Args:
        panels: title -> bins, as of `metrics.bins`.
    """
    figure = Figure(figsize=(1 + 4 * len(panels), 5.2), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (title, bins), (above, below) in zip(panels.items(), axes.T, strict=True):
        keys = ("from", "to", "images", "confidence", "accuracy")
        left, right, images, confidence, accuracy = np.array([[row[key] for key in keys] for row in bins]).T
        width, filled = right - left, images > 0
        above.bar(left, accuracy, width, align="edge", color=BARS, alpha=0.75, label="accuracy")
        above.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
        above.vlines(confidence[filled], confidence[filled], accuracy[filled], color=GAP, linewidth=2.5, label="gap")
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
    axis = Figure(figsize=(7.5, 1.6 + 0.36 * len(table)), dpi=120, layout="constrained").subplots()
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.axvline(severities - 0.5, color=axis.get_facecolor(), linewidth=4)
    for (row, column), value in np.ndenumerate(grid):
        axis.text(column, row, f"{value:.1%}", ha="center", va="center", color="black" if value > 0.55 else "white")
    axis.set_xticks(range(severities + 1), [*map(str, range(1, severities + 1)), "mean"])
    axis.set_yticks(range(len(table)), list(table))
    axis.set(xlabel="severity", title=title)
    return axis.figure


def severities(images: Mapping[str, "Tensor"]) -> Figure:
    """What each corruption (a row) makes of an image, at growing severity: uint8 [severities, 3, H, W] a row."""
    import torch
    from torchvision.utils import make_grid

    rows = list(images.values())
    count, _, height, width = rows[0].shape
    axis = Figure(figsize=(6, 0.3 + 0.95 * len(rows)), dpi=120, layout="constrained").subplots()
    grid = make_grid(torch.cat(rows), nrow=count, pad_value=17 if is_dark() else 255)
    axis.imshow(grid.permute(1, 2, 0), interpolation="nearest")
    axis.set_xticks([(width + 2) * (column + 0.5) for column in range(count)], range(1, count + 1))
    axis.set_yticks([(height + 2) * (row + 0.5) for row in range(len(rows))], list(images))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="severity")
    return axis.figure
