"""The interfaces of recipes that change images, whose random numbers are drawn for a whole epoch at once."""

from typing import Protocol

import torch
from torch import Tensor


class Mix(Protocol):
    """A transform that mixes pairs of images, such as `recipes.mixup.Mixup`."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of one epoch, one row per image of the data set: the partner, int64 [count], lam,
        float [count], and the other arguments of `__call__`."""
        ...

    def __call__(self, images: Tensor, partners: Tensor, lam: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images with their partners, uint8 [B, C, H, W]; return the mixed images, uint8, and the weight of the
        label of each image, [B]."""
        ...


class Transform(Protocol):
    """A transform of single images, such as `recipes.trivialaugment.TrivialAugment`."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of one epoch, one row per image of the data set."""
        ...

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Transform images, uint8 [B, C, H, W], according to their draws; return uint8."""
        ...


def box_mask(first: Tensor, extent: Tensor, size: int) -> Tensor:
    """Return which pixels of square images lie in a box, bool [B, size, size].

    Args:
        first: the row and column of the box's first pixel, int64 [B, 2]; the box may extend beyond the image.
        extent: the height and width of the box, int64 [B, 2] or [B, 1].
    """
    distance = torch.arange(size, device=first.device) - first[..., None]
    inside = (distance >= 0) & (distance < extent[..., None])  # rows and columns, [B, 2, size]
    return inside[:, 0, :, None] & inside[:, 1, None, :]
