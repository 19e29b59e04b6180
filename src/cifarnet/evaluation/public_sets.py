"""The public test sets made from CIFAR-10: other images, harder ones, and people's labels; read as published."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifarnet.data import CIFAR10, ImageDataModule, Split
from cifarnet.errors import UserError
from cifarnet.evaluation.robustness import SEVERITIES

# the labels' order in all sets made from CIFAR-10
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_C_EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # not in the published means


class PublicSets(NamedTuple):
    """What the `read_…` functions return; None: not asked for."""

    cifar10_c: dict[str, list[Split]] | None = None
    cifar10_1: dict[str, Split] | None = None
    cifar10h: Tensor | None = None


def read(datamodule: ImageDataModule, cifar10_c: str | None, cifar10_1: str | None, cifar10h: str | None) -> PublicSets:
    """The sets that are asked for, by a folder or file; the test images of `datamodule` say what the network knows.

    Raises:
        UserError: a set cannot be read, or is not for this network.
    """
    task = datamodule.class_names, datamodule.image_size
    if cifar10h is not None and not isinstance(datamodule, CIFAR10):
        raise UserError(
            f"cifar10h={cifar10h} goes by the official order of CIFAR-10's test images, which "
            f"{type(datamodule).__name__} does not have. Use data=cifar10 data.root=<the archive's folder>."
        )
    return PublicSets(
        None if cifar10_c is None else read_cifar10_c(cifar10_c, *task),
        None if cifar10_1 is None else read_cifar10_1(cifar10_1, *task),
        None if cifar10h is None else read_cifar10h(cifar10h, len(datamodule.source.test)),
    )


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
