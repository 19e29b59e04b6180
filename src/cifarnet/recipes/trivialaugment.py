"""TrivialAugment: apply one random operation with a random strength to each image."""

import torch
from torch import Tensor

from cifarnet.recipes.operations import NAMES, apply, draw_strengths
from cifarnet.seeding import generator

LEVELS = 30  # the number of strengths above 0


class TrivialAugment:
    """Apply one random operation out of fourteen to each image, with one of 31 strengths of the paper's "wide" range
    (Müller and Hutter, 2021, https://arxiv.org/abs/2103.10158).

    Config: `data.transforms`, as in `+recipe=trivialaugment`.
    """

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the operation of each image in this epoch, int64 [count], and its strength, float32 [count]."""
        random = generator(seed, epoch, "trivialaugment")
        operation = torch.randint(len(NAMES), (count,), generator=random)
        level = torch.randint(LEVELS + 1, (count,), generator=random) / LEVELS
        most = [0, 0.99, 0.99, 32, 32, 135, *4 * [0.99], 6, 1, 0, 0]
        return operation, draw_strengths(operation, level, most, random)

    def __call__(self, images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
        """Return the changed images, uint8 [B, 3, H, W]."""
        return apply(images, operation, strength)
