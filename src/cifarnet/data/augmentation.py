"""Random crops, flips and holes for a whole batch, as a function of (seed, epoch, index)."""

from typing import Literal

import torch
from torch import Tensor

from cifarnet.data.transforms import box_mask
from cifarnet.seeding import generator

Flip = Literal["none", "random", "alternating"]


class Augment:
    """A random crop of the reflect-padded image, a horizontal flip, and a hole.

    Args:
        crop_padding: pixels of padding on each side; 0 for no crop.
        flip: "random" flips an image with probability 1/2; "alternating" does so in the first epoch, and then flips
            each image in alternate epochs (Jordan, 2024, https://arxiv.org/abs/2404.00498).
        cutout: the side of a square hole centered at a random pixel (DeVries and Taylor, 2017,
            https://arxiv.org/abs/1708.04552); 0 for no hole.
        fill: the color of the hole, one value from 0 to 255 per channel.
    """

    def __init__(self, crop_padding: int = 0, flip: Flip = "none", cutout: int = 0, fill: Tensor | None = None) -> None:
        self.crop_padding, self.flip = crop_padding, flip
        self.cutout, self.fill = cutout, fill

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, for each image of a data set, the first row and column of the crop, int64 [count]; whether it is
        flipped, bool [count]; and the row and column of the hole's center, int64 [count, 2]."""
        random = generator(seed, epoch, "augment")
        top, left = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=random)
        hole = torch.randint(0, size, (count, 2), generator=random)
        if self.flip == "alternating":
            flip = (torch.rand(count, generator=generator(seed, 0, "flip")) < 0.5) ^ bool(epoch % 2)
        else:
            flip = torch.rand(count, generator=random) < (0.5 if self.flip == "random" else 0.0)
        return top, left, flip, hole

    def __call__(self, pixels: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, hole: Tensor) -> Tensor:
        """Augment the images `index` [B] of `pixels`, uint8 [N, H, W, C] -> [B, H, W, C]; each pixel is copied once."""
        _, height, width, channels = pixels.shape
        rows, columns = self._reflected(top, height), self._reflected(left, width)
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        source = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
        images = pixels.view(-1, channels).index_select(0, source.flatten()).view(*source.shape, channels)
        if self.cutout:
            assert self.fill is not None
            self.fill = self.fill.to(images)  # moved to a GPU once
            inside = box_mask(hole - self.cutout // 2, torch.full_like(hole, self.cutout), height)
            images = torch.where(inside[..., None], self.fill, images)
        return images

    def _reflected(self, start: Tensor, size: int) -> Tensor:
        """Return the image's row (or column) for each row of the crop, int64 [B, size]."""
        position = torch.arange(size, device=start.device) + start[:, None] - self.crop_padding
        return (size - 1) - ((size - 1) - position.abs()).abs()  # reflected at both borders
