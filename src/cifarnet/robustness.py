"""Test images that are harder than the test set: corruptions made on the fly, and readers of the public sets."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cifarnet.data import Split
from cifarnet.data.loader import BatchLoader
from cifarnet.errors import UserError
from cifarnet.seeding import derive

SEVERITIES = 5
# the labels' order in all sets made from CIFAR-10
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_C_EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # not in the published means


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
    """Batches of (images uint8 [B, 3, H, W], labels) under a corruption of severity 1 to 5, alike at every pass.

    They are made on the CPU, so that every device sees the same pixels.
    """

    def __init__(
        self, batches: Sequence[tuple[Tensor, Tensor]] | BatchLoader, name: str, severity: int, seed: int = 0
    ) -> None:
        self.batches = batches
        self.apply, levels, _ = CORRUPTIONS[name]
        self.level = levels[severity - 1]
        self.seed = derive(seed, severity, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.random.fork_rng(devices=[]):  # torchvision draws noise from torch's global generator
            torch.manual_seed(self.seed)
            for images, labels in self.batches:
                yield self.apply(images.cpu().contiguous(), self.level), labels


def examples(image: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """A picture uint8 [3, H, W] under every corruption, at all severities: uint8 [5, 3, H, W]."""
    batch = [(image[None], torch.zeros(1))]
    levels = range(1, SEVERITIES + 1)
    return {
        name: torch.cat([images for level in levels for images, _ in Corrupted(batch, name, level, seed)])
        for name in CORRUPTIONS
    }


def read_cifar10_c(folder: str, class_names: Sequence[str], image_size: int) -> dict[str, list[Split]]:
    """CIFAR-10-C as published (Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261).

    Returns:
        The test set under each corruption, five times at growing severity. Pixels are read when they are used.

    Raises:
        UserError: a file is missing or not as published, or the network knows other classes.
    """
    _check_classes("cifar10_c", class_names)
    labels = _labels(Path(folder) / "labels.npy", "cifar10_c")
    paths = [path for path in sorted(Path(folder).glob("*.npy")) if path.name != "labels.npy"]
    if not paths:
        raise UserError(f"cifar10_c={folder}: there are no corruptions, such as gaussian_noise.npy, beside labels.npy.")
    if len(labels) % SEVERITIES:
        raise UserError(f"{folder}/labels.npy has {len(labels)} labels: expected {SEVERITIES} blocks of equal length.")
    found = {}
    for path in paths:
        images = _images(path, "cifar10_c", len(labels), image_size)
        size = len(labels) // SEVERITIES
        found[path.stem] = [Split(*block) for block in zip(images.split(size), labels.split(size), strict=True)]
    return found


def read_cifar10_1(folder: str, class_names: Sequence[str], image_size: int) -> dict[str, Split]:
    """CIFAR-10.1 as published (Recht et al., 2018, https://arxiv.org/abs/1806.00451): v4, v6 or both.

    Raises:
        UserError: neither is there, a file is not as published, or the network knows other classes.
    """
    _check_classes("cifar10_1", class_names)
    found = {}
    for path in sorted(Path(folder).glob("cifar10.1_v*_data.npy")):
        labels = _labels(path.with_name(path.name.replace("_data", "_labels")), "cifar10_1")
        version = re.sub(r"cifar10\.1_(.*)_data", r"\1", path.stem)
        found[version] = Split(_images(path, "cifar10_1", len(labels), image_size), labels)
    if not found:
        raise UserError(f"cifar10_1={folder} has no cifar10.1_v6_data.npy or cifar10.1_v4_data.npy.")
    return found


def read_cifar10h(path: str, count: int) -> Tensor:
    """How people label each test image, in its official order: CIFAR-10H's `cifar10h-probs.npy`, float64 [count, 10].

    Raises:
        UserError: the file is not as published, or for another number of test images.
    """
    people = _array(Path(path), "cifar10h")
    if people.shape != (count, len(CIFAR10_CLASSES)) or people.dtype.kind != "f":
        raise UserError(
            f"{path} holds {people.dtype} {list(people.shape)}: expected probabilities of "
            f"{len(CIFAR10_CLASSES)} classes for {count:,} test images."
        )
    if not (np.allclose(people.sum(1), 1, atol=1e-3) and people.min() >= 0):
        raise UserError(f"{path} holds no probabilities: every row must be from 0 to 1 and sum to 1.")
    return torch.from_numpy(people).double()


def _check_classes(setting: str, class_names: Sequence[str]) -> None:
    if list(class_names) != CIFAR10_CLASSES:
        raise UserError(
            f"{setting}: its labels are CIFAR-10's, {', '.join(CIFAR10_CLASSES)}; this network knows "
            f"{', '.join(class_names)}. Leave {setting} out."
        )


def _images(path: Path, setting: str, count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size]"""
    images = _array(path, setting)
    if images.dtype != np.uint8 or images.shape != (count, size, size, 3):
        raise UserError(
            f"{path} holds {images.dtype} {list(images.shape)}: expected uint8 {[count, size, size, 3]}, "
            "an image for each label, of the network's size."
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _labels(path: Path, setting: str) -> Tensor:
    """int64 [N]"""
    labels = _array(path, setting)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{path} holds {labels.dtype} {list(labels.shape)}: expected a list of whole numbers.")
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{path}: labels from {labels.min()} to {labels.max()}; expected 0 to 9.")
    return torch.from_numpy(labels.astype(np.int64))


def _array(path: Path, setting: str) -> np.ndarray:
    """Mapped into memory, not read; a file that holds objects is refused."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{setting}: there is no file {path}.") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no array of numbers in numpy's format ({error}).") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays: expected one, as np.save writes it.")
    return array
