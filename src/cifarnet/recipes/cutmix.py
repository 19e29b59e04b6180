"""CutMix: replace a box of an image with the pixels of another image, and mix the labels by area."""

from typing import Annotated

import torch
from torch import Tensor

from cifarnet.data.transforms import box_mask
from cifarnet.recipes.mixup import Alpha, Mixup, draw_pairs
from cifarnet.schema import Range
from cifarnet.seeding import generator


class CutMix:
    """Replace a box that covers 1 - λ of an image with its partner's pixels, where λ is drawn from a Beta distribution
    (Yun et al., 2019, https://arxiv.org/abs/1905.04899).

    The partner, λ and the box's center are drawn for each image. The center may be anywhere in the image: the box is
    clipped at the border, and the weight of the label is the fraction of the image that remains visible.

    Config: `data.mix`, as in `+recipe=cutmix`.

    Args:
        cutmix_alpha: the parameter of Beta(cutmix_alpha, cutmix_alpha); with 1, all areas are equally likely.
        prob: the fraction of the images with a box (0.5 in the paper's code for CIFAR).
        mixup_alpha: blend the other images with their partners, as `Mixup(mixup_alpha)` does; None does not change
            them.
    """

    def __init__(
        self, cutmix_alpha: Alpha = 1.0, prob: Annotated[float, Range(0, 1)] = 0.5, mixup_alpha: Alpha | None = None
    ) -> None:
        self.cutmix_alpha, self.prob = cutmix_alpha, prob
        self.mixup = None if mixup_alpha is None else Mixup(mixup_alpha)

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, for each image in this epoch, its partner, int64 [count]; λ, float32 [count]; whether it gets a box,
        bool [count]; and the box's center, as fractions of height and width, float32 [count, 2]."""
        random = generator(seed, epoch, "cutmix")
        cut = torch.rand(count, generator=random) < self.prob
        center = torch.rand(count, 2, generator=random)
        partner, lam = draw_pairs(self.cutmix_alpha, count, seed, epoch, "cutmix")
        mixup_lam = torch.ones(count) if self.mixup is None else self.mixup.draw(count, size, seed, epoch)[1]
        return partner, torch.where(cut, lam, mixup_lam), cut, center

    def __call__(
        self, images: Tensor, partners: Tensor, lam: Tensor, cut: Tensor, center: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed images, uint8 [B, C, H, W], and the weights of the images' labels, float32 [B].

        Args:
            images, partners: the images to mix, uint8 [B, C, H, W].
            lam, cut, center: the draws for these images.
        """
        if self.mixup is not None:
            images, _ = self.mixup(images, partners, torch.where(cut, 1, lam))
        size = images.shape[-1]
        length = ((1 - lam).sqrt() * cut * size).long()[:, None]
        inside = box_mask((center * size).long() - length // 2, length, size)
        visible = 1 - inside.float().mean((1, 2))
        return torch.where(inside[:, None], partners, images), torch.where(cut, visible, lam)
