"""Procedural pictures of ten shapes and textures, which need no files and no download."""

from typing import Annotated

import numpy as np
import torch

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.schema import Range, Seed

SIZE = 32
TEST_OFFSET = 1_000_000  # the first index of the test images, above the indices of all training images
CLASS_NAMES = ["disc", "ring", "square", "frame", "triangle", "plus", "cross", "stripes", "checkers", "dots"]
Count = Annotated[int, Range(len(CLASS_NAMES), TEST_OFFSET)]


class Synthetic(ImageDataModule):
    """Shapes with random position, size, angle and color on backgrounds with random color, and noise.

    The color and brightness are independent of the class, so that a network must recognize shapes. A picture is a
    function of (`seed`, index).

    Args:
        seed: the seed of the pictures; it is independent of the seed of the run.
        train_size, test_size: the number of pictures; `train_size` includes the validation split.
        settings: the settings of `ImageDataModule`.
    """

    def __init__(self, seed: Seed = 0, train_size: Count = 10_000, test_size: Count = 2_000, **settings) -> None:
        super().__init__(**settings)
        self.seed, self.train_size, self.test_size = seed, train_size, test_size

    def read(self) -> Source:
        train, test = np.arange(self.train_size), np.arange(self.test_size) + TEST_OFFSET
        return Source(CLASS_NAMES, synthesize(train, self.seed), synthesize(test, self.seed))


def synthesize(index: np.ndarray, seed: int = 0) -> Split:
    """Return the pictures with these indices, uint8 [N, 3, 32, 32]; the label is the index modulo 10."""
    labels = index % len(CLASS_NAMES)
    numbers = np.empty((len(index), 10), np.float32)  # uniform in [0, 1): position, size, angle, two colors
    noise = np.empty((len(index), SIZE, SIZE, 3), np.float32)
    for row, i in enumerate(index.tolist()):
        random = np.random.default_rng((seed, i))
        numbers[row] = random.random(10)
        random.standard_normal(dtype=np.float32, out=noise[row])

    mask = _shapes(labels, numbers[:, :4])[..., None]
    background = numbers[:, None, None, 4:7]
    # a color that differs from the background by at least 0.25 in every channel, brighter or darker
    shift = 0.25 + 0.3 * numbers[:, None, None, 7:10]
    color = np.where(background < 0.5, background + shift, background - shift)
    pictures = np.where(mask, color, background) + 0.16 * noise
    pictures = (pictures.clip(0, 1) * 255).round().astype(np.uint8)
    return Split(torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(labels))


def _shapes(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return which pixels belong to the shape, bool [N, 32, 32]."""
    x0, y0 = 0.7 * numbers[:, None, None, 0] - 0.35, 0.7 * numbers[:, None, None, 1] - 0.35
    radius = 0.5 + 0.25 * numbers[:, None, None, 2]
    angle = 0.6 * numbers[:, None, None, 3] - 0.3  # ± 17°, so that a plus never becomes a cross
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    u = (np.cos(angle) * (x - x0) + np.sin(angle) * (y - y0)) / radius  # the shape fills -1 … 1
    v = (np.cos(angle) * (y - y0) - np.sin(angle) * (x - x0)) / radius

    distance = np.hypot(u, v)
    square = np.maximum(abs(u), abs(v))
    waves_u, waves_v = np.sin(2.5 * np.pi * u), np.sin(2.5 * np.pi * v)
    shapes = [
        distance < 1,
        (distance < 1) & (distance > 0.55),
        square < 0.9,
        (square < 0.9) & (square > 0.5),
        (v < 0.8) & (2 * abs(u) < v + 1),
        (np.minimum(abs(u), abs(v)) < 0.28) & (square < 1),
        (np.minimum(abs(u + v), abs(u - v)) < 0.4) & (square < 0.9),
        (waves_v > 0) & (square < 1),
        (waves_u * waves_v > 0) & (square < 1),
        (waves_u > 0.3) & (waves_v > 0.3) & (square < 1),
    ]
    return np.choose(labels[:, None, None], shapes)
