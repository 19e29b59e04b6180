"""Test images under corruptions of increasing severity."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cifarnet.data.loader import Batch, BatchLoader
from cifarnet.seeding import derive


def _pixelate(images: Tensor, fraction: float) -> Tensor:
    height, width = images.shape[-2:]
    # at least two pixels, because torch fails for a single pixel
    small = F.resize(images, [max(2, round(fraction * height)), max(2, round(fraction * width))])
    return F.resize(small, [height, width], InterpolationMode.NEAREST)


def _blur(images: Tensor, sigma: float) -> Tensor:
    width = min(9, 2 * min(images.shape[-2:]) - 1)  # the reflected border cannot exceed the image
    return F.gaussian_blur(images, [width, width], [sigma])


SEVERITIES = 5
# functions of images, uint8 [B, 3, H, W], and a level; and the level for each severity, chosen for 32×32 pixels
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, float, float, float, float]]] = {
    "noise": (lambda images, sigma: F.gaussian_noise(images, sigma=sigma), (0.02, 0.04, 0.07, 0.1, 0.15)),
    "blur": (_blur, (0.5, 0.7, 0.9, 1.2, 1.6)),  # in pixels
    "JPEG": (lambda images, quality: F.jpeg(images, int(quality)), (70, 50, 30, 20, 10)),
    "pixelate": (_pixelate, (0.75, 0.5, 0.4, 0.25, 0.2)),  # fractions of the resolution
    "posterize": (lambda images, bits: F.posterize(images, int(bits)), (5, 4, 3, 2, 1)),  # bits per channel
    "bright": (F.adjust_brightness, (1.25, 1.5, 2.0, 2.5, 3.5)),  # factors
    "dark": (F.adjust_brightness, (0.7, 0.5, 0.35, 0.25, 0.15)),
    "contrast": (F.adjust_contrast, (0.7, 0.5, 0.35, 0.25, 0.15)),
    "saturation": (F.adjust_saturation, (0.7, 0.5, 0.3, 0.15, 0.0)),
    "rotation": (lambda images, degrees: F.rotate(images, degrees, InterpolationMode.BILINEAR), (5, 10, 15, 20, 30)),
}


class Corrupted:
    """Batches of images under a corruption of severity 1 to 5. The images are the same in every pass."""

    def __init__(self, batches: Sequence[Batch] | BatchLoader, name: str, severity: int, seed: int) -> None:
        self.batches = batches
        self.apply, levels = CORRUPTIONS[name]
        self.level = levels[severity - 1]
        self.seed = derive(seed, severity, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        with torch.random.fork_rng(devices=[]):  # torchvision uses torch's global generator for noise
            torch.manual_seed(self.seed)
            for batch in self.batches:
                images = batch.images.cpu().contiguous()  # so that the pixels are the same for every device
                yield batch._replace(images=self.apply(images, self.level))


def corrupted(batches: Sequence[Batch] | BatchLoader, seed: int) -> dict[str, list[Corrupted]]:
    """Return the batches under every corruption, at all severities."""
    severities = range(1, SEVERITIES + 1)
    return {name: [Corrupted(batches, name, severity, seed) for severity in severities] for name in CORRUPTIONS}


def examples(image: Tensor, seed: int) -> dict[str, Tensor]:
    """Return an image, uint8 [3, H, W], under every corruption at all severities: uint8 [5, 3, H, W]."""
    zero = torch.zeros(1, dtype=torch.int64)
    rows = corrupted([Batch(image[None], zero, zero)], seed)
    return {name: torch.cat([batch.images for batches in row for batch in batches]) for name, row in rows.items()}
