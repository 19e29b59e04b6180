"""RandAugment: apply random operations with the same strength to each image."""

from typing import Annotated

import torch
from torch import Tensor

from cifarnet.recipes.operations import NAMES, apply, draw_strengths
from cifarnet.schema import Range
from cifarnet.seeding import generator


class RandAugment:
    """Apply `num_ops` random operations out of fourteen to each image in sequence (Cubuk et al., 2019,
    https://arxiv.org/abs/1909.13719).

    Config: `data.transforms`, as in `+recipe=randaugment`.

    Args:
        num_ops: the number of operations; an operation may occur twice.
        magnitude: the strength of all operations, from 0 to 30. At 30: a shear of 0.3, a translation by 150/331 of the
            image, a rotation by 30 degrees, factors of 0.1 and 1.9, 4 bits, all levels.
    """

    def __init__(
        self, num_ops: Annotated[int, Range(1, 14)] = 2, magnitude: Annotated[float, Range(0, 30)] = 9
    ) -> None:
        self.num_ops, self.magnitude = num_ops, magnitude

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the operations of each image in this epoch, int64 [count, num_ops], and their strengths, float32."""
        random = generator(seed, epoch, "randaugment")
        operation = torch.randint(len(NAMES), (count, self.num_ops), generator=random)
        shift = 150 / 331 * size
        most = [0, 0.3, 0.3, shift, shift, 30, *4 * [0.9], 4, 1, 0, 0]
        return operation, draw_strengths(operation, self.magnitude / 30, most, random)

    def __call__(self, images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
        """Return the changed images, uint8 [B, 3, H, W]."""
        for step in range(self.num_ops):
            images = apply(images, operation[:, step], strength[:, step])
        return images
