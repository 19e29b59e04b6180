"""Test images made harder on the fly: corruptions of growing severity."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cifarnet.data.loader import BatchLoader
from cifarnet.seeding import derive

SEVERITIES = 5


class Corruption(NamedTuple):
    """Images uint8 [B, 3, H, W] and a level -> images alike. `levels`, of growing severity, are for 32×32 pixels."""

    apply: Callable[[Tensor, float], Tensor]
    levels: tuple[float, float, float, float, float]
    level: str  # what the numbers are


def _pixelate(images: Tensor, share: float) -> Tensor:
    height, width = images.shape[-2:]
    small = F.resize(images, [max(1, round(share * height)), max(1, round(share * width))])
    return F.resize(small, [height, width], InterpolationMode.NEAREST)


CORRUPTIONS = {
    "noise": Corruption(
        lambda images, sigma: F.gaussian_noise(images, sigma=sigma),
        (0.02, 0.04, 0.07, 0.1, 0.15),
        "standard deviation, pixels from 0 to 1",
    ),
    "blur": Corruption(
        lambda images, sigma: F.gaussian_blur(images, [9, 9], [sigma]),
        (0.5, 0.7, 0.9, 1.2, 1.6),
        "standard deviation in pixels",
    ),
    "JPEG": Corruption(lambda images, quality: F.jpeg(images, int(quality)), (70, 50, 30, 20, 10), "quality"),
    "pixelate": Corruption(_pixelate, (0.75, 0.5, 0.4, 0.25, 0.2), "share of the resolution"),
    "posterize": Corruption(lambda images, bits: F.posterize(images, int(bits)), (5, 4, 3, 2, 1), "bits a channel"),
    "bright": Corruption(F.adjust_brightness, (1.25, 1.5, 2.0, 2.5, 3.5), "factor"),
    "dark": Corruption(F.adjust_brightness, (0.7, 0.5, 0.35, 0.25, 0.15), "factor"),
    "contrast": Corruption(F.adjust_contrast, (0.7, 0.5, 0.35, 0.25, 0.15), "factor"),
    "saturation": Corruption(F.adjust_saturation, (0.7, 0.5, 0.3, 0.15, 0.0), "factor"),
    "rotation": Corruption(
        lambda images, angle: F.rotate(images, angle, InterpolationMode.BILINEAR), (5, 10, 15, 20, 30), "degrees"
    ),
}


class Corrupted:
    """Batches of (images uint8 [B, 3, H, W], …) under a corruption of severity 1 to 5, alike at every pass.

    They are made on the CPU, so that every device sees the same pixels.
    """

    def __init__(self, batches: Sequence[Sequence[Tensor]] | BatchLoader, name: str, severity: int, seed: int) -> None:
        self.batches = batches
        self.apply, levels, _ = CORRUPTIONS[name]
        self.level = levels[severity - 1]
        self.seed = derive(seed, severity, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        with torch.random.fork_rng(devices=[]):  # torchvision draws noise from torch's global generator
            torch.manual_seed(self.seed)
            for images, *rest in self.batches:
                yield self.apply(images.cpu().contiguous(), self.level), *rest


def examples(image: Tensor, seed: int) -> dict[str, Tensor]:
    """An image uint8 [3, H, W] under every corruption, at all severities: uint8 [5, 3, H, W]."""
    batch, severities = (image[None],), range(1, SEVERITIES + 1)
    return {
        name: torch.cat([images for severity in severities for (images,) in Corrupted([batch], name, severity, seed)])
        for name in CORRUPTIONS
    }
