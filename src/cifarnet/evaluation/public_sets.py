"""The public test sets that extend CIFAR-10: CIFAR-10-C, CIFAR-10.1 and CIFAR-10H, in their published formats."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifarnet.data import CIFAR10, CIFAR100, ImageDataModule, InMemoryLoader
from cifarnet.errors import UserError, reason
from cifarnet.evaluation.robustness import SEVERITIES

# the order of the labels in all of these sets
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_C_EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # not in the published means


class PublicSets(NamedTuple):
    """Public test sets; None for sets that were not requested. The pixels are read from the files when they are used.

    Attributes:
        cifar10_c: the test images under each corruption, one loader per severity.
        cifar10_1: the images of version v4, v6 or both.
        cifar10h: the distribution of human labels for each test image, float64 [N, 10].
        ood: sets of out-of-distribution images, by the names in the setting `ood`; see `ood.read`.
    """

    cifar10_c: dict[str, list[InMemoryLoader]] | None = None
    cifar10_1: dict[str, InMemoryLoader] | None = None
    cifar10h: Tensor | None = None
    ood: dict[str, InMemoryLoader] | None = None


def read(data: ImageDataModule, cifar10_c: str | None, cifar10_1: str | None, cifar10h: str | None) -> PublicSets:
    """Read the public test sets from these folders or files; `data` contains the test images of the network.

    Raises:
        UserError: a file is missing or has another format, or the network has other classes than a set.
    """
    if cifar10h is not None and (not isinstance(data, CIFAR10) or isinstance(data, CIFAR100)):
        raise UserError(
            f"cifar10h={cifar10h} requires CIFAR-10's test images in the official order; the data is "
            f"{type(data).__name__}. Choose data=cifar10 data.root=<folder of the archive>."
        )
    for setting, folder in {"cifar10_c": cifar10_c, "cifar10_1": cifar10_1}.items():
        if folder is not None and list(data.class_names) != CIFAR10_CLASSES:
            problem = f"{setting}={folder} requires CIFAR-10's classes; the network has {', '.join(data.class_names)}"
            raise UserError(f"{problem}. Remove {setting}.")
    return PublicSets(
        None if cifar10_c is None else _cifar10_c(Path(cifar10_c), data),
        None if cifar10_1 is None else _cifar10_1(Path(cifar10_1), data),
        None if cifar10h is None else _cifar10h(Path(cifar10h), len(data.source.test)),
    )


def _cifar10_c(folder: Path, data: ImageDataModule) -> dict[str, list[InMemoryLoader]]:
    """Read CIFAR-10-C (Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261): five severities per file."""
    labels = _labels(folder / "labels.npy")
    paths = sorted(set(folder.glob("*.npy")) - {folder / "labels.npy"})
    if not paths or len(labels) % SEVERITIES:
        raise UserError(
            f"cifar10_c={folder} has {len(paths)} corruptions and {len(labels)} labels: expected files such as "
            f"gaussian_noise.npy, with {SEVERITIES} severities of the same images. Download the set again."
        )
    loaders = {}
    for path in paths:
        images = _images(path, len(labels), data.image_size)
        blocks = zip(images.chunk(SEVERITIES), labels.chunk(SEVERITIES), strict=True)
        loaders[path.stem] = [InMemoryLoader(*block, data.eval_batch_size) for block in blocks]
    return loaders


def _cifar10_1(folder: Path, data: ImageDataModule) -> dict[str, InMemoryLoader]:
    """Read CIFAR-10.1 (Recht et al., 2018, https://arxiv.org/abs/1806.00451)."""
    loaders = {}
    for path in sorted(folder.glob("cifar10.1_v*_data.npy")):
        version = path.stem.removeprefix("cifar10.1_").removesuffix("_data")
        labels = _labels(folder / f"cifar10.1_{version}_labels.npy")
        images = _images(path, len(labels), data.image_size)
        loaders[version] = InMemoryLoader(images, labels, data.eval_batch_size)
    if not loaders:
        names = "cifar10.1_v6_data.npy or cifar10.1_v4_data.npy"
        raise UserError(f"cifar10_1={folder} has no {names}. Download the set again.")
    return loaders


def _cifar10h(path: Path, count: int) -> Tensor:
    """Read CIFAR-10H's `cifar10h-probs.npy` (Peterson et al., 2019, https://arxiv.org/abs/1908.07086)."""
    humans = _array(path, np.floating, (count, len(CIFAR10_CLASSES)))
    if not (np.allclose(humans.sum(1), 1, atol=1e-3) and humans.min() >= 0):
        problem = "has rows that are not probabilities from 0 to 1 with a sum of 1"
        raise UserError(f"{path} {problem}. Download it again.")
    return torch.from_numpy(humans.astype(np.float64))


def _images(path: Path, count: int, size: int) -> Tensor:
    """Read images, uint8 [count, 3, size, size]."""
    return torch.from_numpy(_array(path, np.uint8, (count, size, size, 3))).permute(0, 3, 1, 2)


def _labels(path: Path) -> Tensor:
    """Read labels, int64 [N]."""
    labels = _array(path, np.integer)
    if not len(labels) or labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{path} has labels other than 0 to 9. Download it again.")
    return torch.from_numpy(labels.astype(np.int64))


def _array(path: Path, dtype: type[np.generic], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Map an array into memory. Arrays of pickled objects are refused.

    Args:
        dtype: the expected type of the numbers, such as np.uint8 or np.integer.
        shape: the expected shape; None: one dimension of any length.

    Raises:
        UserError: the file does not exist, or has other content.
    """
    try:
        if not path.is_file():  # reading a pipe would wait forever
            raise ValueError("there is no such file")
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if not np.issubdtype(array.dtype, dtype) or array.shape != (shape or array.shape[:1]):
            expected = f"{dtype.__name__} {list(shape or ['N'])}"
            raise ValueError(f"it has {array.dtype} {list(array.shape)}, expected {expected}")
    except Exception as error:  # a damaged file can raise many types
        raise UserError(f"{path} cannot be read: {reason(error)[:200]}. Download it again.") from error
    return array
