"""Mixup: blend each image with another image, and their labels."""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from cifarnet.schema import Range
from cifarnet.seeding import derive, generator

Alpha = Annotated[float, Range(above=0, most=1000)]


class Mixup:
    """Blend pairs of images: x ← λx + (1 - λ)x', loss ← λ loss(y) + (1 - λ) loss(y'), where λ is drawn from Beta(alpha,
    alpha) (Zhang et al., 2018, https://arxiv.org/abs/1710.09412).

    The partner and λ are drawn for each image.

    Config: `data.mix`, as in `+recipe=mixup`.

    Args:
        alpha: the parameter of the Beta distribution; larger values mix images more evenly.
    """

    def __init__(self, alpha: Alpha = 0.2) -> None:
        self.alpha = alpha

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the partner, int64 [count], and λ, float32 [count], of each image in this epoch."""
        return draw_pairs(self.alpha, count, seed, epoch, "mixup")

    def __call__(self, images: Tensor, partners: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed images, uint8, and λ; images and partners are uint8 [B, C, H, W], lam is float [B]."""
        mixed = torch.lerp(partners.float(), images.float(), lam[:, None, None, None])
        return mixed.round().to(torch.uint8), lam


def draw_pairs(alpha: float, count: int, seed: int, epoch: int, stream: str) -> tuple[Tensor, Tensor]:
    """Return, for each image, its partner, int64 [count], and λ from Beta(alpha, alpha), float32 [count].

    Partners depend only on (seed, epoch); `stream` selects the random numbers of λ.
    """
    partner = torch.randint(0, count, (count,), generator=generator(seed, epoch, "partner"))
    lam = np.random.default_rng(derive(seed, epoch, stream)).beta(alpha, alpha, count)
    return partner, torch.from_numpy(lam).float()
