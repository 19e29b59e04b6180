"""Figures for people: predictions, mistakes, the confusion matrix, reliability, robustness."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

RIGHT, WRONG, WRONG_ON_DARK = "#1a7f37", "#cf222e", "#f85149"
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


def _is_dark() -> bool:
    return sum(to_rgb(rcParams["figure.facecolor"])) < 1.5


def predictions(
    images: "Tensor", labels: "Tensor", predicted: "Tensor", class_names: Sequence[str], columns: int = 8
) -> Figure:
    """A grid of images with predicted and true class, mistakes in red.

    Shapes: images uint8 [N, 3, H, W]; labels and predicted int64 [N].
    """
    right = int((labels == predicted).sum())
    captions = [
        (class_names[guess], RIGHT) if label == guess else (f"✗ {class_names[guess]}\n(is {class_names[label]})", WRONG)
        for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    return _grid(images, captions, f"Predictions on test pictures: {right} of {len(images)} right", columns)


def mistakes(images: "Tensor", rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Wrongly classified images, uint8 [N, 3, H, W]; the record's `mistakes` say as what, how surely, and the truth."""
    red = WRONG_ON_DARK if _is_dark() else WRONG
    captions = [(f"{row['predicted']} {row['confidence']:.1%}\n(is {row['class']})", red) for row in rows]
    return _grid(images, captions, "The most confident mistakes", columns=5)


def _grid(images: "Tensor", captions: Sequence[tuple[str, str]], title: str, columns: int) -> Figure:
    """Images, each under its caption in a colour."""
    rows = -(-len(images) // columns)
    width, height = 1.35 * columns, 1.75 * rows + 0.5  # inches
    figure = Figure(figsize=(width, height), dpi=120)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all: to lay out forty takes a second
    for place, (image, (caption, colour)) in enumerate(zip(images, captions, strict=True)):
        left, bottom = 1.35 * (place % columns) + 0.075, 1.75 * (place // columns) + 2.2
        extent = (left, left + 1.2, bottom, bottom - 1.2)
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", extent=extent)
        written = {"fontsize": 9, "color": colour, "ha": "center", "va": "bottom", "parse_math": False}
        axis.text(left + 0.6, bottom - 1.24, caption, **written)
    axis.text(width / 2, 0.3, title, fontsize=13, ha="center", va="center")
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.axis("off")
    return figure


def heated(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image, uint8 [H, W, 3], under a map of heat, float [H, W] from 0 to 1: uint8 [H, W, 3]; grey where cold."""
    grey = np.repeat(image.mean(2, keepdims=True) / 255, 3, axis=2)
    shade = 0.7 * heat[..., None]
    return ((grey * (1 - shade) + colormaps["inferno"](heat)[..., :3] * shade) * 255).round().astype(np.uint8)


def explained(image: np.ndarray, heat: np.ndarray, ranked: Sequence[tuple[str, float]], source: str = "") -> Figure:
    """An image as the network sees it, where it looked for the likeliest class, and probabilities, the highest first,
    under where it lies.

    Shapes: image uint8 [H, W, 3]; heat float [H, W] from 0 to 1.
    """
    figure = Figure(figsize=(9, 1.2 + max(1.9, 0.22 * len(ranked))), dpi=120, layout="constrained")
    seen, looked, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    for axis, pixels, title in [
        (seen, image, "as the network sees it"),
        (looked, heated(image, heat), "where it looked"),
    ]:
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.suptitle(source, fontsize=9, parse_math=False)
    names, shares = zip(*ranked, strict=True)
    bars.barh(range(len(names)), shares, color=[BARS] + ["grey"] * (len(names) - 1))
    bars.set_yticks(range(len(names)), names, parse_math=False)
    bars.invert_yaxis()
    for place, share in enumerate(shares):
        bars.text(share + 0.02, place, f"{share:.1%}", va="center", fontsize=9)
    bars.set(xlim=(0, 1.2), xticks=[], title="")
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def confusion(matrix: "Tensor", class_names: Sequence[str]) -> Figure:
    """A confusion matrix, int64 [num_classes, num_classes], as shares of the true class (a row)."""
    counts = matrix.double()
    share = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    cells = 0.5 * len(class_names)  # inches
    longest = max(map(len, class_names))
    left, bottom = 0.5 + 0.09 * longest, 0.6 + 0.065 * longest
    width, height = max(left + cells + 0.4, 3.8), bottom + cells + 0.5
    figure = Figure(figsize=(width, height), dpi=120)
    axis = figure.add_axes((left / width, bottom / height, cells / width, cells / height))  # faster than a layout
    dark = _is_dark()
    axis.imshow(share, cmap="Blues_r" if dark else "Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    axis.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, class_names)
    axis.set(xlabel="predicted", ylabel="true")
    figure.suptitle("Confusion matrix, % of each true class", y=1 - 0.15 / height)
    if len(class_names) <= 20:  # more would be unreadable
        for (row, column), percent in np.ndenumerate((100 * share).round().astype(int)):
            if percent > 0:
                colour = "white" if (percent > 50) != dark else "black"
                axis.text(column, row, percent, ha="center", va="center", color=colour)
    return figure


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
    grid = make_grid(torch.cat(rows), nrow=count, pad_value=17 if _is_dark() else 255)
    axis.imshow(grid.permute(1, 2, 0), interpolation="nearest")
    axis.set_xticks([(width + 2) * (column + 0.5) for column in range(count)], range(1, count + 1))
    axis.set_yticks([(height + 2) * (row + 0.5) for row in range(len(rows))], list(images))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="severity")
    return axis.figure


def as_image(figure: Figure) -> np.ndarray:
    """The figure as pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
