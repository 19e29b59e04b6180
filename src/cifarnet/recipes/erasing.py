"""Random erasing: replace a box of an image with noise."""

from typing import Annotated

import torch
from torch import Tensor

from cifarnet.data.transforms import box_mask
from cifarnet.schema import Range
from cifarnet.seeding import generator

ROW = 2**16  # bytes of noise, the same in all runs; the noise of an image starts at a random byte


class RandomErasing:
    """Replace the pixels of a random box with noise in a fraction of the images (Zhong et al., 2017,
    https://arxiv.org/abs/1708.04896).

    The box lies inside the image. Its height is side × √ratio and its width is side / √ratio, clipped to the size of
    the image, with a ratio from 0.3 to 1 / 0.3.

    Config: `data.transforms`, as in `+recipe=erasing`.

    Args:
        prob: the fraction of the images with a box.
        area: the maximum area of the box, as a fraction of the image; the minimum is 0.02.
    """

    def __init__(self, prob: Annotated[float, Range(0, 1)] = 0.5, area: Annotated[float, Range(0.02, 1)] = 0.4) -> None:
        self.prob, self.area = prob, area
        self.noise = torch.empty(0, dtype=torch.uint8)  # drawn at the first call, and stored on the images' device

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for each image in this epoch, the box's first row and column, int64 [count, 2]; its height and width,
        int64 [count, 2], 0 for no box; and the first byte of its noise, int64 [count]."""
        random = generator(seed, epoch, "erasing")
        erased, area, ratio = torch.rand(3, count, generator=random)
        side = (0.02 + (self.area - 0.02) * area).sqrt() * size
        stretch = 0.3 ** (ratio - 0.5)  # the square root of the ratio, whose logarithm is uniform
        extent = torch.stack([side * stretch, side / stretch], 1).round().long().clamp(1, size)
        place = (torch.rand(count, 2, generator=random) * (size + 1 - extent)).long()
        return place, extent * (erased < self.prob)[:, None], torch.randint(ROW, (count,), generator=random)

    def __call__(self, images: Tensor, place: Tensor, extent: Tensor, start: Tensor) -> Tensor:
        """Return the changed images, uint8 [B, C, H, W]."""
        pixels = images[0].numel()
        if len(self.noise) != ROW + pixels:
            self.noise = torch.randint(256, (ROW + pixels,), dtype=torch.uint8, generator=generator(0, 0, "noise"))
        self.noise = self.noise.to(images.device)
        noise = self.noise.unfold(0, pixels, 1)[start].view(images.shape)
        inside = box_mask(place, extent, images.shape[-1])
        return torch.where(inside[:, None], noise, images)
