"""CutMix: a rectangle of every image is cut out of another one, and labels are mixed by its area."""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from cifarnet.config import Range, checked
from cifarnet.recipes.mixup import Mixup
from cifarnet.seeding import derive, generator

Alpha = Annotated[float, Range(above=0, most=1000)]


class CutMix:
    """A rectangle of the partner's, at the same place, covers 1 - λ of the image, with λ from a Beta distribution
    (Yun et al., 2019, https://arxiv.org/abs/1905.04899). Partner, λ and place are drawn for every image by itself.

    The rectangle's middle may be anywhere: what reaches beyond the image is cut off, and the weight of the image's own
    label is the part of it that is still seen.

    A recipe for images: `data.mix`, as in `+recipe=cutmix`.

    Args:
        cutmix_alpha: λ is from Beta(cutmix_alpha, cutmix_alpha): 1 makes all areas equally likely.
        prob: part of the images that are cut (the paper's code has 0.5 for CIFAR).
        mixup_alpha: the others are blended with their partners, as `Mixup(mixup_alpha)` does; None: shown as they are.

    Raises:
        UserError: a number out of its range.
    """

    @checked("data.mix")
    def __init__(
        self,
        cutmix_alpha: Alpha = 1.0,
        prob: Annotated[float, Range(0, 1)] = 0.5,
        mixup_alpha: Alpha | None = None,
    ) -> None:
        self.cutmix_alpha, self.prob = cutmix_alpha, prob
        self.mixup = None if mixup_alpha is None else Mixup(mixup_alpha)

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Of every image in this epoch: its partner, int64 [count]; λ, float32 [count]; whether it is cut, bool
        [count]; and the rectangle's middle, as parts of height and width, float32 [count, 2]."""
        random = generator(seed, epoch, "cutmix")
        cut = torch.rand(count, generator=random) < self.prob
        middle = torch.rand(count, 2, generator=random)
        beta = np.random.default_rng(derive(seed, epoch, "cutmix")).beta(self.cutmix_alpha, self.cutmix_alpha, count)
        if self.mixup is not None:
            partner, others = self.mixup.draw(count, size, seed, epoch)
        else:
            partner = torch.randint(0, count, (count,), generator=generator(seed, epoch, "partner"))
            others = torch.ones(count)
        return partner, torch.where(cut, torch.from_numpy(beta).float(), others), cut, middle

    def __call__(
        self, images: Tensor, partners: Tensor, weight: Tensor, cut: Tensor, middle: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images and partners, uint8 [B, C, H, W], and their draws -> the mixed images, uint8, and the part of each
        that is its own, float32 [B]."""
        if self.mixup is not None:
            images, _ = self.mixup(images, partners, torch.where(cut, 1, weight))
        side = (1 - weight).sqrt() * cut  # as parts of the image's
        row, column = middle.unbind(1)
        height, width = images.shape[-2:]
        inside = _inside(row, side, height)[:, :, None] & _inside(column, side, width)[:, None]
        seen = 1 - inside.float().mean((1, 2))
        return torch.where(inside[:, None], partners, images), torch.where(cut, seen, weight)


def _inside(middle: Tensor, side: Tensor, size: int) -> Tensor:
    """Which rows (or columns) of the image are the rectangle's: bool [B, size]."""
    length = (side * size).long()
    distance = torch.arange(size, device=middle.device) - ((middle * size).long() - length // 2)[:, None]
    return (distance >= 0) & (distance < length[:, None])
