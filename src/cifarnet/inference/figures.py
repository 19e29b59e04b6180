"""Figures of a network's predictions: labelled images, mistakes, the confusion matrix, Grad-CAM."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

RIGHT, WRONG, WRONG_ON_DARK = "#1a7f37", "#cf222e", "#f85149"
BARS = "#0969da"


def is_dark() -> bool:
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
    red = WRONG_ON_DARK if is_dark() else WRONG
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
    dark = is_dark()
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


def as_image(figure: Figure) -> np.ndarray:
    """The figure as pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
