"""The public test sets made from CIFAR-10: other images, harder ones, and people's labels; read as published."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifarnet.data import CIFAR10, ImageDataModule, InMemoryLoader
from cifarnet.errors import UserError
from cifarnet.evaluation.robustness import SEVERITIES

# the labels' order in all sets made from CIFAR-10
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_C_EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # not in the published means


class PublicSets(NamedTuple):
    """None: not asked for. Pixels are read from their files when they are used."""

    cifar10_c: dict[str, list[InMemoryLoader]] | None = None  # the test set under each corruption, ever more severe
    cifar10_1: dict[str, InMemoryLoader] | None = None  # v4, v6 or both
    cifar10h: Tensor | None = None  # how people label each test image, float64 [N, 10]


def read(datamodule: ImageDataModule, cifar10_c: str | None, cifar10_1: str | None, cifar10h: str | None) -> PublicSets:
    """The sets that are asked for, by a folder or file; the test images of `datamodule` say what the network knows.

    Raises:
        UserError: a file is missing or not as published, or a set is not for this network.
    """
    if cifar10h is not None and not isinstance(datamodule, CIFAR10):
        raise UserError(
            f"cifar10h={cifar10h} goes by the official order of CIFAR-10's test images, which "
            f"{type(datamodule).__name__} does not have. Use data=cifar10 data.root=<the archive's folder>."
        )
    for setting, folder in [("cifar10_c", cifar10_c), ("cifar10_1", cifar10_1)]:
        if folder is not None and list(datamodule.class_names) != CIFAR10_CLASSES:
            raise UserError(
                f"{setting}: its labels are CIFAR-10's, {', '.join(CIFAR10_CLASSES)}; this network knows "
                f"{', '.join(datamodule.class_names)}. Leave {setting} out."
            )
    batching = datamodule.image_size, datamodule.eval_batch_size
    return PublicSets(
        None if cifar10_c is None else _cifar10_c(Path(cifar10_c), *batching),
        None if cifar10_1 is None else _cifar10_1(Path(cifar10_1), *batching),
        None if cifar10h is None else _cifar10h(Path(cifar10h), len(datamodule.source.test)),
    )


def _cifar10_c(folder: Path, image_size: int, batch_size: int) -> dict[str, list[InMemoryLoader]]:
    """CIFAR-10-C (Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261): five severities a file."""
    labels = _labels("cifar10_c", folder / "labels.npy")
    paths = sorted(set(folder.glob("*.npy")) - {folder / "labels.npy"})
    if not paths:
        raise UserError(f"cifar10_c={folder}: there are no corruptions, such as gaussian_noise.npy, beside labels.npy.")
    if len(labels) % SEVERITIES:
        raise UserError(f"{folder}/labels.npy has {len(labels)} labels: expected {SEVERITIES} blocks of equal length.")
    found = {}
    for path in paths:
        images = _images("cifar10_c", path, len(labels), image_size)
        blocks = zip(images.chunk(SEVERITIES), labels.chunk(SEVERITIES), strict=True)
        found[path.stem] = [InMemoryLoader(*block, batch_size) for block in blocks]
    return found


def _cifar10_1(folder: Path, image_size: int, batch_size: int) -> dict[str, InMemoryLoader]:
    """CIFAR-10.1 (Recht et al., 2018, https://arxiv.org/abs/1806.00451)."""
    found = {}
    for path in sorted(folder.glob("cifar10.1_v*_data.npy")):
        version = path.stem.removeprefix("cifar10.1_").removesuffix("_data")
        labels = _labels("cifar10_1", folder / f"cifar10.1_{version}_labels.npy")
        found[version] = InMemoryLoader(_images("cifar10_1", path, len(labels), image_size), labels, batch_size)
    if not found:
        raise UserError(f"cifar10_1={folder} has no cifar10.1_v6_data.npy or cifar10.1_v4_data.npy.")
    return found


def _cifar10h(path: Path, count: int) -> Tensor:
    """CIFAR-10H's `cifar10h-probs.npy` (Peterson et al., 2019, https://arxiv.org/abs/1908.07086)."""
    shape = (count, len(CIFAR10_CLASSES))
    expected = f"probabilities of {shape[1]} classes for {count:,} test images"
    people = _array("cifar10h", path, expected, lambda array: array.dtype.kind == "f" and array.shape == shape)
    if not (np.allclose(people.sum(1), 1, atol=1e-3) and people.min() >= 0):
        raise UserError(f"{path} holds no probabilities: every row must be from 0 to 1 and sum to 1.")
    return torch.from_numpy(people.astype(np.float64))


def _images(setting: str, path: Path, count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size]"""
    shape = (count, size, size, 3)
    expected = f"uint8 {list(shape)}, an image for each label, of the network's size"
    images = _array(setting, path, expected, lambda array: array.dtype == np.uint8 and array.shape == shape)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _labels(setting: str, path: Path) -> Tensor:
    """int64 [N]"""
    expected = "a list of whole numbers"
    labels = _array(setting, path, expected, lambda array: array.dtype.kind in "iu" and array.ndim == 1 and len(array))
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{path}: labels from {labels.min()} to {labels.max()}; expected 0 to 9.")
    return torch.from_numpy(labels.astype(np.int64))


def _array(setting: str, path: Path, expected: str, fits: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Mapped into memory, not read; a file that holds objects, or what does not fit, is refused."""
    if not path.is_file():  # nor a pipe, which would be waited for
        raise UserError(f"{setting}: there is no file {path}.")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes numpy raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no array of numbers in numpy's format ({reason}).") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays: expected one, as np.save writes it.")
    if not fits(array):
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}: expected {expected}.")
    return array
