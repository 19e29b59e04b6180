"""The interfaces of recipes that change images, whose random numbers are drawn for a whole epoch at once."""

from typing import Protocol

import torch
from torch import Tensor


class Mix(Protocol):
    """Mixes pairs of images, such as `recipes.mixup.Mixup`; all random numbers are drawn for every image."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of one epoch, one row for each image of the data set: the partner, int64 [count],
        lam, float [count], and the further arguments of `__call__`."""
        ...

    def __call__(self, images: Tensor, partners: Tensor, lam: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images and their partners, uint8 [B, C, H, W], and return the mixed images, uint8, and the weight of each
        image's own label, [B]."""
        ...


class Transform(Protocol):
    """Changes single images, such as `recipes.trivialaugment.TrivialAugment`."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of one epoch, one row for each image of the data set."""
        ...

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Change images, uint8 [B, C, H, W], according to their draws, and return them as uint8."""
        ...


def box_mask(first: Tensor, extent: Tensor, size: int) -> Tensor:
    """Return which pixels of square images lie in a box, bool [B, size, size].

    Args:
        first: row and column of the box's first pixel, int64 [B, 2]; the box may reach beyond the image.
        extent: height and width of the box, int64 [B, 2] or [B, 1].
    """
    distance = torch.arange(size, device=first.device) - first[..., None]
    inside = (distance >= 0) & (distance < extent[..., None])  # rows and columns, [B, 2, size]
    return inside[:, 0, :, None] & inside[:, 1, None, :]
