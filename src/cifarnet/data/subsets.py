"""The images that a run trains on and validates with, and their training labels.

Everything is a function of the labels, the settings and `split_seed`, and does not depend on `seed`.
"""

import hashlib
import json
import math
import os
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifarnet.errors import UserError, reason
from cifarnet.schema import Range, Seed
from cifarnet.seeding import generator

Noise = Literal["symmetric", "pairs"]


class Selected(NamedTuple):
    train: Tensor  # the positions of the training images in the data set, int64, ascending
    val: Tensor  # the positions of the validation images
    rest: Tensor  # the positions of all other images, of which the training images are a subset
    labels: Tensor  # the label of each image of the data set in training, int64 [N]
    files_sha256: str | None  # the first 16 digits of a checksum of the numbers in the files; None without files


class Selection:
    """The settings of a data module that select its training and validation images.

    They are applied in this order: `labels`, `folds` or `val_fraction`, `keep`, `imbalance`, `train_share` or
    `images_per_class`, `label_noise`. Validation and test images keep their true labels. Each class is divided in the
    same way. A smaller share is a subset of a larger one.

    Args:
        val_fraction: the fraction of each class's training images that is set aside for validation, if the source has
            no validation images; 0 trains on all images, without validation.
        split_seed: determines all selections. It is independent of `seed`, so that all seeds use the same images.
        folds, fold: divide the training images into `folds` parts, and validate on the part number `fold` (from 0);
            `val_fraction` is then ignored.
        keep: a file with the positions of the images to train on, such as a coreset. Positions count from 0 in the
            training images of the data set, before any are set aside; those that are set aside are not trained on.
        imbalance: the ratio of the largest to the smallest class in a long tail: of the C classes, class c keeps
            n × imbalance^(-c / (C - 1)) images, where n is the size of the largest class (Cui et al., 2019,
            https://arxiv.org/abs/1901.05555).
        train_share: the fraction of each class's remaining images to train on; at least one image.
        images_per_class: the number of images of each class to train on.
        labels: a file with the label of every training image of the data set, such as noisy labels from annotators.
        label_noise: the fraction of each class's training images whose labels are made wrong.
        noise_type: symmetric, the default: all other classes are equally likely; pairs: class c becomes c + 1, and the
            last class becomes class 0 (Han et al., 2018, https://arxiv.org/abs/1804.06872).

    Files contain integers: text with one number per line, or a one-dimensional array in NumPy's format (.npy).
    """

    def __init__(
        self,
        val_fraction: Annotated[float, Range(0, below=1)] = 0.1,
        split_seed: Seed = 0,
        folds: Annotated[int, Range(2, 10**6)] | None = None,
        fold: Annotated[int, Range(0, 10**6)] | None = None,
        keep: str | None = None,
        imbalance: Annotated[float, Range(1, 10**6)] | None = None,
        train_share: Annotated[float, Range(above=0, most=1)] | None = None,
        images_per_class: Annotated[int, Range(1, 10**9)] | None = None,
        labels: str | None = None,
        label_noise: Annotated[float, Range(0, below=1)] | None = None,
        noise_type: Noise | None = None,
    ) -> None:
        super().__init__()
        if folds is None and fold is not None:
            raise UserError(f"data.fold={fold} needs the number of folds: add data.folds=5.")
        if folds is not None and (fold is None or fold >= folds):
            last = folds - 1
            remedy = f"Choose data.fold=0 to data.fold={last}, or train on all of them: -m 'data.fold=range({folds})'."
            raise UserError(f"data.fold={'null' if fold is None else fold} is not one of the {folds} folds. {remedy}")
        if noise_type is not None and label_noise is None:
            raise UserError(f"data.noise_type={noise_type} needs the share of wrong labels: add data.label_noise=0.2.")
        if train_share is not None and images_per_class is not None:
            both = f"data.train_share={train_share} and data.images_per_class={images_per_class}"
            raise UserError(f"{both} exclude each other. Remove one of them.")
        self.val_fraction, self.split_seed, self.folds, self.fold = val_fraction, split_seed, folds, fold
        self.files = {"labels": labels, "keep": keep}
        self.imbalance, self.label_noise = imbalance, label_noise
        self.noise_type: Noise = noise_type or "symmetric"
        self.train_share, self.images_per_class = train_share, images_per_class

    @property
    def changes_training(self) -> bool:
        """Whether a setting leaves out training images, besides those for validation, or changes training labels."""
        subset = (self.imbalance, self.train_share, self.images_per_class)
        return any(setting is not None for setting in (*self.files.values(), *subset, self.label_noise))

    def select(self, true: Tensor, num_classes: int, sets_aside: bool = True) -> Selected:
        """Select images by their true labels, int64 [N].

        Args:
            sets_aside: set images aside for validation.

        Raises:
            UserError: a file cannot be used, or there are too few images for a setting.
        """
        shuffled = torch.randperm(len(true), generator=generator(self.split_seed, 0, "split"))
        is_val = self._is_val(true[shuffled]) if sets_aside else torch.zeros(len(true), dtype=torch.bool)
        train, val, rest = shuffled[~is_val], shuffled[is_val].sort().values, shuffled[~is_val].sort().values
        limits = {"labels": num_classes, "keep": len(true)}
        files = {name: read_integers(f"data.{name}", path, limits[name]) for name, path in self.files.items() if path}
        labels = files.get("labels", true)
        if len(labels) != len(true):
            problem = f"data.labels={self.files['labels']} has {len(labels):,} labels for {len(true):,} training images"
            raise UserError(f"{problem}. Use a file with one label for each image, before any are set aside.")
        if "keep" in files:
            train = train[torch.isin(train, files["keep"])]
        if self.imbalance is not None:
            largest = int(torch.bincount(true[train], minlength=1).max())
            train = _first(train, true, torch.tensor(long_tail(largest, self.imbalance, num_classes)))
        counts = torch.bincount(true[train], minlength=num_classes)
        if self.train_share is not None:
            train = _first(train, true, (counts.double() * self.train_share).round().clamp_min(1))
        if (wanted := self.images_per_class) is not None:
            if wanted > (least := int(counts.min())):
                problem = f"data.images_per_class={wanted}: the smallest class has {least} training images"
                raise UserError(f"{problem}. Select more images of this class, or use fewer of each.")
            train = _first(train, true, torch.full((num_classes,), wanted))
        if len(train) == 0:
            raise UserError(f"data.keep={self.files['keep']} leaves no training images. Add positions of others.")
        train = train.sort().values
        if self.label_noise is not None:
            labels = labels.clone()
            noise = generator(self.split_seed, 0, "label noise")
            labels[train] = noisy(labels[train], self.label_noise, self.noise_type, num_classes, noise)
        content = json.dumps({name: values.tolist() for name, values in files.items()})
        return Selected(train, val, rest, labels, hashlib.sha256(content.encode()).hexdigest()[:16] if files else None)

    def _is_val(self, labels: Tensor) -> Tensor:
        """Return which of the shuffled images with these labels are set aside for validation, bool [N]."""
        is_val = torch.zeros(len(labels), dtype=torch.bool)
        counts = torch.bincount(labels)
        if self.folds is not None:
            if (least := int(counts[counts > 0].min())) < self.folds:
                problem = f"data.folds={self.folds}: the smallest class has {least} training images"
                raise UserError(f"{problem}. Use at most {least} folds." if least > 1 else f"{problem}. Add images.")
            # counting on from class to class makes the sizes of all folds differ by at most one, too
            is_val[labels.argsort(stable=True)[self.fold :: self.folds]] = True
            return is_val
        is_val = ranks(labels) < (counts.double() * self.val_fraction).round()[labels]
        if self.val_fraction and (is_val.all() or not is_val.any()):
            part = "training" if is_val.all() else "validation"
            problem = f"data.val_fraction={self.val_fraction} leaves none of {len(labels)} images for {part}"
            raise UserError(f"{problem}. Choose another fraction, or train without validation: data.val_fraction=0.")
        return is_val


def ranks(labels: Tensor) -> Tensor:
    """Return the number of earlier images of the same class for each image, int64 [N]."""
    order, counts = labels.argsort(stable=True), torch.bincount(labels)
    first = counts.cumsum(0) - counts
    result = torch.empty_like(labels)
    result[order] = torch.arange(len(labels)) - first[labels[order]]
    return result


def _first(index: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return the first `counts[c]` images of each class c, in the order of `index`; `labels` of all images."""
    return index[ranks(labels[index]) < counts[labels[index]]]


def long_tail(largest: int, imbalance: float, num_classes: int) -> list[int]:
    """Return the number of images of each class, which decreases exponentially from `largest` to `largest / imbalance`,
    rounded down, but is at least 1."""
    shares = [imbalance ** (-label / max(1, num_classes - 1)) for label in range(num_classes)]
    return [max(1, math.floor(largest * share + 1e-9)) for share in shares]


def noisy(labels: Tensor, share: float, noise_type: Noise, num_classes: int, random: torch.Generator) -> Tensor:
    """Return labels [N], of which a share in each class, rounded to whole images, is replaced with other classes."""
    shuffled = torch.randperm(len(labels), generator=random)
    shift = torch.randint(1, num_classes, (len(labels),), generator=random)
    wrong = _first(shuffled, labels, (torch.bincount(labels).double() * share).round())
    changed = labels.clone()
    changed[wrong] = (labels[wrong] + (shift[wrong] if noise_type == "symmetric" else 1)) % num_classes
    return changed


def balanced(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the image at each position of an epoch, int64 [N], before the positions are shuffled.

    There are as many positions as labels. The numbers of images of the classes differ by at most one. All images of a
    class occur equally often, except for one time."""
    random, parts = generator(seed, epoch, "balanced"), []
    classes = labels.unique()
    classes = classes[torch.randperm(len(classes), generator=random)]  # the first ones get one image more
    for number, label in enumerate(classes):
        members = (labels == label).nonzero()[:, 0]
        count = (len(labels) + len(classes) - 1 - number) // len(classes)
        rounds = range(-(-count // len(members)))
        parts.append(torch.cat([members[torch.randperm(len(members), generator=random)] for _ in rounds])[:count])
    return torch.cat(parts)


def balanced_weights(labels: Tensor, num_classes: int) -> list[float]:
    """Return a weight for each class that is inversely proportional to its number of images; 0 for absent classes.

    The mean weight over all images is 1.
    """
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    present = sum(count > 0 for count in counts)
    return [len(labels) / (present * count) if count else 0.0 for count in counts]


def read_integers(setting: str, path: str, below: int) -> Tensor:
    """Read integers from 0 to `below` - 1, int64 [N], from a text file or a file in NumPy's format (.npy).

    Raises:
        UserError: the file cannot be read, or contains other values.
    """
    remedy = f"Use a text file with one integer from 0 to {below - 1} per line, or such an array in a .npy file."
    file = os.path.expanduser(path)
    try:
        values = np.load(file, allow_pickle=False) if path.endswith(".npy") else np.loadtxt(file, np.int64, ndmin=1)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError(f"it contains {values.dtype} {list(values.shape)}")
        if len(wrong := values[(values < 0) | (values >= below)]):
            raise ValueError(f"it contains {wrong[0]}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{setting}={path} cannot be used: {reason(error)}. {remedy}") from error
    return torch.from_numpy(values.astype(np.int64))
