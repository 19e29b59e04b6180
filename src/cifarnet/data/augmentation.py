"""Random crops, flips and holes of a whole batch at once, as a function of (seed, epoch, index)."""

from typing import NamedTuple

import torch
from torch import Tensor

from cifarnet.errors import UserError
from cifarnet.seeding import generator

FLIPS = ("none", "random", "alternating")


class Draws(NamedTuple):
    """One epoch's augmentation of every image of a data set, or that of a batch."""

    top: Tensor  # int64 [N]: first row of the crop, 0 to 2 × padding, in the padded image
    left: Tensor  # int64 [N]: first column
    flip: Tensor  # bool [N]: mirrored left to right?
    hole: Tensor  # int64 [N, 2]: row and column at the middle of the hole

    def at(self, index: Tensor) -> "Draws":
        """The draws of these images."""
        return Draws(*(drawn[index] for drawn in self))

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(drawn.to(device, non_blocking=True) for drawn in self))


class Augment:
    """A random crop out of the reflect-padded image, a mirror image, a hole.

    Args:
        crop_padding: pixels of reflection on each side, before a crop of the original size; 0 switches it off.
        flip: "random" mirrors an image with probability 1/2; "alternating" does so at random in the first epoch and
            then in every other one, so that two epochs show every image both ways (Jordan, 2024,
            https://arxiv.org/abs/2404.00498); "none".
        cutout: side of a square hole at a random place, part of it perhaps outside the image (DeVries and Taylor,
            2017, https://arxiv.org/abs/1708.04552); 0 switches it off.
        fill: colour of the hole, one value from 0 to 255 a channel.
    """

    def __init__(self, crop_padding: int = 0, flip: str = "none", cutout: int = 0, fill: Tensor | None = None) -> None:
        if flip not in FLIPS:
            raise UserError(f"data.flip={flip}: choose one of {', '.join(FLIPS)}")
        self.crop_padding = crop_padding
        self.flip = flip
        self.cutout = cutout
        self.fill = fill

    def draw(self, count: int, size: int, seed: int, epoch: int) -> Draws:
        """Decide for all `count` images of a data set at once, so that neither order nor batch size matters."""
        random = generator(seed, epoch, "augment")
        top, left = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=random)
        hole = torch.randint(0, size, (count, 2), generator=random)
        if self.flip == "alternating":
            flip = (torch.rand(count, generator=generator(seed, 0, "flip")) < 0.5) ^ bool(epoch % 2)
        else:
            flip = torch.rand(count, generator=random) < (0.5 if self.flip == "random" else 0.0)
        return Draws(top, left, flip, hole)

    def __call__(self, pixels: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """The augmented images `index` [B] out of `pixels`, uint8 [N, H, W, C] -> [B, H, W, C].

        Each output pixel is copied once, from where it lies: no padded images in between.
        """
        _, height, width, channels = pixels.shape
        rows = self._reflected(draws.top, height)
        columns = self._reflected(draws.left, width)
        columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
        source = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
        images = pixels.view(-1, channels).index_select(0, source.flatten()).view(*source.shape, channels)
        if self.cutout:
            assert self.fill is not None
            inside = (
                self._in_hole(draws.hole[:, 0], height)[:, :, None] & self._in_hole(draws.hole[:, 1], width)[:, None]
            )
            images = torch.where(inside[..., None], self.fill.to(images), images)
        return images

    def _reflected(self, start: Tensor, size: int) -> Tensor:
        """Which row (or column) of the image each of the crop is: int64 [B, size]."""
        position = torch.arange(size, device=start.device) + start[:, None] - self.crop_padding
        return (size - 1) - ((size - 1) - position.abs()).abs()  # mirrored at both borders

    def _in_hole(self, middle: Tensor, size: int) -> Tensor:
        distance = torch.arange(size, device=middle.device) - middle[:, None] + self.cutout // 2
        return (distance >= 0) & (distance < self.cutout)
