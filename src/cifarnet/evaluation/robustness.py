"""Test images made harder on the fly: corruptions of growing severity."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cifarnet.data.loader import BatchLoader
from cifarnet.seeding import derive


def _pixelate(images: Tensor, share: float) -> Tensor:
    height, width = images.shape[-2:]
    # at least two pixels: torch fails at a single one
    small = F.resize(images, [max(2, round(share * height)), max(2, round(share * width))])
    return F.resize(small, [height, width], InterpolationMode.NEAREST)


def _blur(images: Tensor, sigma: float) -> Tensor:
    width = min(9, 2 * min(images.shape[-2:]) - 1)  # more would be reflected than a small image has
    return F.gaussian_blur(images, [width, width], [sigma])


SEVERITIES = 5
# a function of images uint8 [B, 3, H, W] and a level, which gives such images, and its levels, for 32×32 pixels
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, float, float, float, float]]] = {
    "noise": (lambda images, sigma: F.gaussian_noise(images, sigma=sigma), (0.02, 0.04, 0.07, 0.1, 0.15)),  # of 1
    "blur": (_blur, (0.5, 0.7, 0.9, 1.2, 1.6)),  # in pixels
    "JPEG": (lambda images, quality: F.jpeg(images, int(quality)), (70, 50, 30, 20, 10)),
    "pixelate": (_pixelate, (0.75, 0.5, 0.4, 0.25, 0.2)),  # share of the resolution
    "posterize": (lambda images, bits: F.posterize(images, int(bits)), (5, 4, 3, 2, 1)),  # bits a channel
    "bright": (F.adjust_brightness, (1.25, 1.5, 2.0, 2.5, 3.5)),  # factors
    "dark": (F.adjust_brightness, (0.7, 0.5, 0.35, 0.25, 0.15)),
    "contrast": (F.adjust_contrast, (0.7, 0.5, 0.35, 0.25, 0.15)),
    "saturation": (F.adjust_saturation, (0.7, 0.5, 0.3, 0.15, 0.0)),
    "rotation": (lambda images, degrees: F.rotate(images, degrees, InterpolationMode.BILINEAR), (5, 10, 15, 20, 30)),
}


class Corrupted:
    """Batches of (images uint8 [B, 3, H, W], …) under a corruption of severity 1 to 5, alike at every pass."""

    def __init__(self, batches: Sequence[Sequence[Tensor]] | BatchLoader, name: str, severity: int, seed: int) -> None:
        self.batches = batches
        self.apply, levels = CORRUPTIONS[name]
        self.level = levels[severity - 1]
        self.seed = derive(seed, severity, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        with torch.random.fork_rng(devices=[]):  # torchvision draws noise from torch's global generator
            torch.manual_seed(self.seed)
            for images, *rest in self.batches:
                yield self.apply(images.cpu().contiguous(), self.level), *rest  # the same pixels for every device


def corrupted(batches: Sequence[Sequence[Tensor]] | BatchLoader, seed: int) -> dict[str, list[Corrupted]]:
    """The batches under every corruption, at all severities."""
    severities = range(1, SEVERITIES + 1)
    return {name: [Corrupted(batches, name, severity, seed) for severity in severities] for name in CORRUPTIONS}


def examples(image: Tensor, seed: int) -> dict[str, Tensor]:
    """An image uint8 [3, H, W] under every corruption, at all severities: uint8 [5, 3, H, W]."""
    rows = corrupted([(image[None],)], seed)
    return {name: torch.cat([images for batches in row for (images,) in batches]) for name, row in rows.items()}
