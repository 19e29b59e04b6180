"""Mixup: every image is shown together with another one, and so are their labels."""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from cifarnet.config import Range, checked
from cifarnet.seeding import derive, generator


class Mixup:
    """x ← λx + (1 - λ)x', loss ← λ loss(y) + (1 - λ) loss(y'), with λ from a Beta(alpha, alpha) distribution
    (Zhang et al., 2018, https://arxiv.org/abs/1710.09412). Partner and λ are drawn for every image by itself.

    A recipe for images: `data.mix`, as in `+recipe=mixup`.

    Args:
        alpha: above 0; the larger, the more evenly two images are mixed.

    Raises:
        UserError: an alpha that is not above 0.
    """

    @checked("data.mix")
    def __init__(self, alpha: Annotated[float, Range(above=0, most=1000)] = 0.2) -> None:
        self.alpha = alpha

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The partner, int64 [count], and λ, float32 [count], of every image in this epoch."""
        partner = torch.randint(0, count, (count,), generator=generator(seed, epoch, "partner"))
        weight = np.random.default_rng(derive(seed, epoch, "mixup")).beta(self.alpha, self.alpha, count)
        return partner, torch.from_numpy(weight).float()

    def __call__(self, images: Tensor, partners: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Images and partners, uint8 [B, C, H, W], weight [B] -> the mixed images, uint8, and the same weight."""
        mixed = torch.lerp(partners.float(), images.float(), weight[:, None, None, None])
        return mixed.round().to(torch.uint8), weight
