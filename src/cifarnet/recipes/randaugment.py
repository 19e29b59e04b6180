"""RandAugment: every image is changed by some operations at random, of one strength."""

from typing import Annotated

import torch
from torch import Tensor

from cifarnet.recipes.operations import NAMES, apply, either_way
from cifarnet.schema import Range
from cifarnet.seeding import generator


class RandAugment:
    """`num_ops` of fourteen operations for every image, one after another (Cubuk et al., 2019,
    https://arxiv.org/abs/1909.13719).

    A recipe for images: `data.transforms`, as in `+recipe=randaugment`.

    Args:
        num_ops: so many operations; each may come twice.
        magnitude: of all, from 0 to 30; the strongest are a shear of 0.3, a translation of 150/331 of the image, 30
            degrees, factors of 0.1 and 1.9, 4 bits, all levels.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(
        self, num_ops: Annotated[int, Range(1, 14)] = 2, magnitude: Annotated[float, Range(0, 30)] = 9
    ) -> None:
        self.num_ops, self.magnitude = num_ops, magnitude

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Of every image in this epoch, its operations, int64 [count, num_ops], and their strengths, float32."""
        random = generator(seed, epoch, "randaugment")
        operation = torch.randint(len(NAMES), (count, self.num_ops), generator=random)
        sign = torch.randint(2, (count, self.num_ops), generator=random) * 2 - 1
        far = 150 / 331 * size
        strength = self.magnitude / 30 * torch.tensor([0, 0.3, 0.3, far, far, 30, *4 * [0.9], 4, 1, 0, 0])
        return operation, either_way(operation, strength[operation], sign)

    def __call__(self, images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
        """Images, uint8 [B, 3, H, W], and their draws -> the changed images, uint8."""
        for step in range(self.num_ops):
            images = apply(images, operation[:, step], strength[:, step])
        return images
