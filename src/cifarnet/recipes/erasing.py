"""Random erasing: a rectangle of an image becomes noise."""

from typing import Annotated

import torch
from torch import Tensor

from cifarnet.data.augmentation import box_mask
from cifarnet.schema import Range
from cifarnet.seeding import generator

ROW = 2**16  # bytes of noise, the same in all runs: each image begins somewhere in them


class RandomErasing:
    """In a part of all images, a rectangle at random, wholly inside, whose pixels become noise (Zhong et al., 2017,
    https://arxiv.org/abs/1708.04896).

    Height is side × √ratio and width side / √ratio, at most the image's; the ratio is from 0.3 to 1 / 0.3.

    A recipe for images: `data.transforms`, as in `+recipe=erasing`.

    Args:
        prob: part of the images in which something is erased.
        area: part of the image that may be erased, at most (at least 0.02).

    Raises:
        UserError: a number out of its range.
    """

    def __init__(self, prob: Annotated[float, Range(0, 1)] = 0.5, area: Annotated[float, Range(0.02, 1)] = 0.4) -> None:
        self.prob, self.area = prob, area
        self.noise = torch.empty(0, dtype=torch.uint8)  # the row, drawn for the first images and kept where they are

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of every image in this epoch: first row and column, int64 [count, 2], height and width (0 where nothing is
        erased), int64 [count, 2], and where in a row of noise its own begins, int64 [count]."""
        random = generator(seed, epoch, "erasing")
        erased, area, ratio = torch.rand(3, count, generator=random)
        side = (0.02 + (self.area - 0.02) * area).sqrt() * size
        stretch = 0.3 ** (ratio - 0.5)  # square root of the ratio, whose logarithm is evenly distributed
        extent = torch.stack([side * stretch, side / stretch], 1).round().long().clamp(1, size)
        place = (torch.rand(count, 2, generator=random) * (size + 1 - extent)).long()
        return place, extent * (erased < self.prob)[:, None], torch.randint(ROW, (count,), generator=random)

    def __call__(self, images: Tensor, place: Tensor, extent: Tensor, start: Tensor) -> Tensor:
        """Images, uint8 [B, C, H, W], and their draws -> the changed images, uint8."""
        pixels = images[0].numel()
        if len(self.noise) != ROW + pixels:
            self.noise = torch.randint(256, (ROW + pixels,), dtype=torch.uint8, generator=generator(0, 0, "noise"))
        self.noise = self.noise.to(images.device)
        noise = self.noise.unfold(0, pixels, 1)[start].view(images.shape)
        inside = box_mask(place, extent, images.shape[-1])
        return torch.where(inside[:, None], noise, images)
