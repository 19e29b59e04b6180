"""Figures of a network's predictions: images with their classes, mistakes, the confusion matrix and Grad-CAM."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from cifarnet.errors import printable
from cifarnet.records.figures import plain_text

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor

RIGHT, WRONG = "#1a7f37", "#cf222e"
BARS = "#0969da"
MANY = 20  # numbers in more columns of a heat map would be unreadable


def predictions(
    images: "Tensor", labels: "Tensor", predicted: "Tensor", class_names: Sequence[str], title: str | None = None
) -> Figure:
    """Draw a grid of images with their predicted classes; mistakes are red and also show the true class.

    Args:
        images: uint8 [N, 3, H, W].
        labels, predicted: int64 [N].
        title: replaces the number of right predictions.
    """
    captions = []
    for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        mistake = f"✗ {class_names[guess]}\n(is {class_names[label]})"
        captions.append((class_names[guess], RIGHT) if label == guess else (mistake, WRONG))
    num_right = int((labels == predicted).sum())
    title = title or f"Predictions on test pictures: {num_right} of {len(images)} right"
    return grid(images, captions, title, columns=8)


def mistakes(images: Any, rows: Sequence[Mapping[str, Any]], title: str, columns: int) -> Figure:
    """Draw wrongly classified test images.

    Args:
        images: all test images, uint8 [N, 3, H, W], in memory or decoded on access.
        rows: the wrong predictions, like the `mistakes` of an evaluation.
    """
    captions = [(f"{row['predicted']} {row['confidence']:.1%}\n(is {row['class']})", WRONG) for row in rows]
    return grid([images[row["index"]] for row in rows], captions, title, columns)


def grid(images: "Sequence[Tensor] | Tensor", captions: Sequence[tuple[str, str]], title: str, columns: int) -> Figure:
    """Draw images, uint8 [3, H, W], each below its caption (text and color)."""
    rows = -(-len(images) // columns)
    width, height = 1.35 * columns, 1.75 * rows + 0.5  # inches
    figure = Figure(figsize=(width, height), dpi=120)
    axis = figure.add_axes((0, 0, 1, 1))  # one axis for all images, because the layout of forty axes takes a second
    for number, (image, (caption, color)) in enumerate(zip(images, captions, strict=True)):
        left, bottom = 1.35 * (number % columns) + 0.075, 1.75 * (number // columns) + 2.2
        extent = (left, left + 1.2, bottom, bottom - 1.2)
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", extent=extent)
        longest = max(map(len, caption.splitlines()), default=0)
        style: Any = {"fontsize": min(9, 150 / max(1, longest)), "color": color, "ha": "center", "va": "bottom"}
        axis.text(left + 0.6, bottom - 1.24, printable(caption), **style)
    fontsize = min(13, 110 * width / max(1, len(title)))
    axis.text(width / 2, 0.3, printable(title), fontsize=fontsize, ha="center", va="center")
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.axis("off")
    return figure


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a gray image, uint8 [H, W, 3], colored where a map, float [H, W] from 0 to 1, is high."""
    gray = np.repeat(image.mean(2, keepdims=True) / 255, 3, axis=2)
    shade = 0.7 * heat[..., None]
    return ((gray * (1 - shade) + colormaps["inferno"](heat)[..., :3] * shade) * 255).round().astype(np.uint8)


def explanation(image: np.ndarray, heat: np.ndarray, ranked: Sequence[tuple[str, float]], source: str = "") -> Figure:
    """Draw the network's input, its Grad-CAM map, and the probabilities of the classes.

    Args:
        image: uint8 [H, W, 3].
        heat: float [H, W] from 0 to 1.
        ranked: classes and their probabilities, in descending order.
        source: the title.
    """
    figure = Figure(figsize=(9, 1.2 + max(1.9, 0.22 * len(ranked))), dpi=120, layout="constrained")
    left, middle, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    pictures = [(left, image, "the network's input"), (middle, overlay(image, heat), "Grad-CAM")]
    for axis, pixels, title in pictures:
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.suptitle(source, fontsize=9)
    names, probabilities = zip(*ranked, strict=True)
    bars.barh(range(len(names)), probabilities, color=[BARS] + ["gray"] * (len(names) - 1))
    bars.set_yticks(range(len(names)), [printable(name) for name in names])
    bars.invert_yaxis()
    for row, probability in enumerate(probabilities):
        bars.text(probability + 0.02, row, f"{probability:.1%}", va="center", fontsize=9)
    bars.set(xlim=(0, 1.2), xticks=[], title="")
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def confusion(matrix: "Tensor", class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix, int64 [num_classes, num_classes], in percent of each true class (a row)."""
    counts = matrix.double()
    fractions = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    shown = "% of each true class" if len(class_names) <= MANY else "darker cells are larger shares of a true class"
    figure = heat_map(fractions, class_names, class_names, f"Confusion matrix, {shown}")
    figure.axes[0].set(xlabel="predicted", ylabel="true")
    return figure


def heat_map(
    fractions: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, decimals: int = 0
) -> Figure:
    """Draw fractions, float [rows, columns], as colored cells with their values in percent.

    Without decimals, zeros are left out. More than `MANY` columns have smaller cells without values, whose color is
    proportional to the square root of the fraction.
    """
    rows, columns = ([printable(name) for name in names] for names in (rows, columns))
    cell = 0.5 if len(columns) <= MANY else min(0.3, 11 / len(columns))  # inches
    height, width, fontsize = cell * len(rows), cell * len(columns), min(10, max(5, 60 * cell))
    left, bottom = 0.5 + 0.09 * max(map(len, rows)), 0.6 + 0.065 * max(map(len, columns))
    step = math.ceil(fontsize / (60 * cell))  # with hundreds of classes, there is no space for all names
    whole = max(left + width + 0.4, 4.6), bottom + height + 0.5
    figure = Figure(figsize=whole, dpi=120)
    axis = figure.add_axes((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
    axis.imshow(fractions, cmap="Blues", norm=PowerNorm(1 if len(columns) <= MANY else 0.5, 0, 1))
    style: Any = {"rotation": 45} if len(columns) <= MANY else {"rotation": 90, "va": "center"}
    style |= {"ha": "right", "rotation_mode": "anchor", "fontsize": fontsize}
    axis.set_xticks(range(0, len(columns), step), columns[::step], **style)
    axis.set_yticks(range(0, len(rows), step), rows[::step], fontsize=fontsize)
    figure.suptitle(title, y=1 - 0.15 / whole[1])
    if len(columns) <= MANY:
        for (row, column), percent in np.ndenumerate((100 * fractions).round(decimals)):
            if percent > 0 or decimals:
                color = "white" if percent > 50 else "black"
                axis.text(column, row, f"{percent:.{decimals}f}", ha="center", va="center", color=color)
    return figure


def as_image(figure: Figure) -> np.ndarray:
    """Return a figure as pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    with plain_text(figure):
        canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
