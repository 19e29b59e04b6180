"""The interfaces of recipes that change images, whose random numbers are drawn for a whole epoch at once."""

import random
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cifarnet.errors import UserError, reason
from cifarnet.seeding import generator


class Mix(Protocol):
    """A transform that mixes pairs of images, such as `recipes.mixup.Mixup`."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of one epoch, one row per image of the data set: the partner, int64 [count], lam,
        float [count], and the other arguments of `__call__`."""
        ...

    def __call__(self, images: Tensor, partners: Tensor, lam: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images with their partners, uint8 [B, C, H, W]; return the mixed images, uint8, and the weight of the
        label of each image, [B]."""
        ...


class Transform(Protocol):
    """A transform of single images, such as `recipes.trivialaugment.TrivialAugment`."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Draw the random numbers of one epoch, one row per image of the data set."""
        ...

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Transform images, uint8 [B, C, H, W], according to their draws; return uint8."""
        ...


class PerImage:
    """Applies a transform that has no `draw`, such as torchvision's, to one image after the other on the CPU.

    Before each call, the generators of torch, Python and NumPy are seeded as a function of (seed, epoch, name, index).

    Args:
        name: the name in `data.transforms`.
        function: takes and returns an image, uint8 [C, H, W].
    """

    def __init__(self, name: str, function: Callable[[Tensor], Any]) -> None:
        self.name, self.function = name, function

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor]:
        """Return the seed of each image, int64 [count]."""
        return (torch.randint(2**63 - 1, (count,), generator=generator(seed, epoch, f"transform {self.name}")),)

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return the changed images, uint8 [B, C, H, W].

        Raises:
            UserError: the transform fails, or does not return an image of the same type and shape.
        """
        changed = []
        with isolate_rng(include_cuda=False):
            for image, seed in zip(images.cpu(), seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002, transforms use the global generator
                changed.append(self._apply(image))
        return torch.stack(changed).to(images.device)

    def _apply(self, image: Tensor) -> Tensor:
        try:
            changed = self.function(image)
            if getattr(changed, "dtype", None) != image.dtype or changed.shape != image.shape:
                details = f" {changed.dtype} {[*changed.shape]}" if isinstance(changed, Tensor) else ""
                raise TypeError(f"it returned {type(changed).__name__}{details}")
        except Exception as error:  # a transform may raise any type
            raise UserError(
                f"data.transforms.{self.name} ({type(self.function).__name__}) cannot be used: "
                f"{reason(error)}. A transform must take and return a tensor, uint8 "
                f"{[*image.shape]}; remove ToTensor, ToDtype and Normalize, because the network normalizes the images."
            ) from error
        return changed


def box_mask(first: Tensor, extent: Tensor, size: int) -> Tensor:
    """Return which pixels of square images lie in a box, bool [B, size, size].

    Args:
        first: the row and column of the box's first pixel, int64 [B, 2]; the box may extend beyond the image.
        extent: the height and width of the box, int64 [B, 2] or [B, 1].
    """
    distance = torch.arange(size, device=first.device) - first[..., None]
    inside = (distance >= 0) & (distance < extent[..., None])  # rows and columns, [B, 2, size]
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images, uint8 [B, C, H, W] -> [B, C, size, size]."""
    if images.shape[-1] == size:
        return images
    if images.device.type == "cpu":  # fast in uint8, which other devices do not support
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    scaled = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return scaled.round().to(torch.uint8)
