"""Random crops and flips of a whole batch at once, as a function of (seed, epoch, index)."""

from typing import NamedTuple

import torch
from torch import Tensor

from cifarnet.seeding import generator


class Draws(NamedTuple):
    """One epoch's augmentation of every image of a data set."""

    top: Tensor  # int64 [N]: first row of the crop, 0 to 2 × padding, in the padded image
    left: Tensor  # int64 [N]: first column
    flip: Tensor  # bool [N]: mirrored left to right?


class Augment:
    """A random crop out of the reflect-padded image, then a mirror image of every other one.

    Args:
        crop_padding: pixels of reflection on each side, before a crop of the original size; 0 switches it off.
        flip: mirror an image with probability 1/2.
    """

    def __init__(self, crop_padding: int, flip: bool) -> None:
        self.crop_padding = crop_padding
        self.flip = flip

    def draw(self, count: int, seed: int, epoch: int) -> Draws:
        """Decide for all `count` images of a data set at once, so that neither order nor batch size matters."""
        random = generator(seed, epoch, "augment")
        top, left = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=random)
        flip = torch.rand(count, generator=random) < (0.5 if self.flip else 0.0)
        return Draws(top, left, flip)

    def sources(self, draws: Draws, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where each output row and column comes from: int64 [B, height] and [B, width], reflection included."""
        rows = torch.arange(height, device=draws.top.device) + draws.top[:, None] - self.crop_padding
        columns = torch.arange(width, device=draws.left.device) + draws.left[:, None] - self.crop_padding
        columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
        return _reflect(rows, height), _reflect(columns, width)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions from -(size - 1) to 2 × (size - 1) back into 0 … size - 1, mirroring at the borders."""
    return (size - 1) - ((size - 1) - position.abs()).abs()
