"""Jitter: random changes of brightness and contrast."""

from typing import Annotated

import torch
from torch import Tensor

from cifarnet.recipes.operations import blend, gray
from cifarnet.schema import Range
from cifarnet.seeding import generator


class Jitter:
    """Multiply each image's brightness, then its contrast, by a factor from 1 - x to 1 + x (Howard, 2013,
    https://arxiv.org/abs/1312.5402; torchvision's ColorJitter).

    Config: `data.transforms`, as in `+recipe=jitter`.

    Args:
        brightness, contrast: the values of x.
    """

    def __init__(
        self, brightness: Annotated[float, Range(0, 1)] = 0.2, contrast: Annotated[float, Range(0, 1)] = 0.2
    ) -> None:
        self.brightness, self.contrast = brightness, contrast

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return both factors of each image in this epoch, float32 [count]."""
        brightness, contrast = 2 * torch.rand(2, count, generator=generator(seed, epoch, "jitter")) - 1
        return 1 + self.brightness * brightness, 1 + self.contrast * contrast

    def __call__(self, images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
        """Return the changed images, uint8 [B, 3, H, W]."""
        images = blend(images, 0.0, brightness[:, None, None, None])
        return blend(images, gray(images).mean((1, 2, 3), keepdim=True), contrast[:, None, None, None])
