"""TrivialAugment: every image is changed by one operation at random, of random strength."""

import torch
from torch import Tensor

from cifarnet.recipes.operations import NAMES, apply, either_way
from cifarnet.seeding import generator

LEVELS = 30  # and none


class TrivialAugment:
    """One of fourteen operations for every image, of a strength that is one of 31, up to the "wide" ones
    (Müller and Hutter, 2021, https://arxiv.org/abs/2103.10158).

    A recipe for images: `data.transforms`, as in `+recipe=trivialaugment`.
    """

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Of every image in this epoch, its operation, int64 [count], and its strength, float32 [count]."""
        random = generator(seed, epoch, "trivialaugment")
        operation = torch.randint(len(NAMES), (count,), generator=random)
        level = torch.randint(LEVELS + 1, (count,), generator=random) / LEVELS
        sign = torch.randint(2, (count,), generator=random) * 2 - 1
        most = torch.tensor([0, 0.99, 0.99, 32, 32, 135, *4 * [0.99], 6, 1, 0, 0])
        return operation, either_way(operation, level * most[operation], sign)

    def __call__(self, images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
        """Images, uint8 [B, 3, H, W], and their draws -> the changed images, uint8."""
        return apply(images, operation, strength)
