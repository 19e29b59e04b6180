"""Figures for people: predictions, curves, the confusion matrix."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

RIGHT, WRONG = "#1a7f37", "#cf222e"
TRAIN, VAL = "#0969da", "#d1570a"


def predictions(
    images: Tensor, labels: Tensor, predicted: Tensor, class_names: Sequence[str], columns: int = 8
) -> Figure:
    """A grid of pictures with predicted and true class, mistakes in red.

    Shapes: images uint8 [N, 3, H, W]; labels and predicted int64 [N].
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.75 * rows + 0.5), dpi=120, layout="constrained")
    right = int((labels == predicted).sum())
    figure.suptitle(f"Predictions on test pictures: {right} of {len(images)} right", fontsize=13)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, guess in zip(axes.flat, images, labels.tolist(), predicted.tolist(), strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        if label == guess:
            axis.set_title(class_names[guess], fontsize=9, color=RIGHT)
        else:
            axis.set_title(f"✗ {class_names[guess]}\n(is {class_names[label]})", fontsize=9, color=WRONG)
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


def confusion(matrix: Tensor, class_names: Sequence[str]) -> Figure:
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


def as_image(figure: Figure) -> Tensor:
    """The figure as pixels, uint8 [3, H, W]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)
