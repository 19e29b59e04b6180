"""The classification data sets of torchvision."""

import operator
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from cifarnet.data.datamodule import Source, Split
from cifarnet.data.folder import ImageFolder, cached
from cifarnet.data.pixels import as_image, fitted
from cifarnet.data.streaming import LazyImages
from cifarnet.errors import UserError, as_user_error, reason
from cifarnet.schema import accepts, check_arguments, did_you_mean
from cifarnet.system.files import downloading, find_or_fetch, scratch_folder
from cifarnet.system.hardware import cores

SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}  # the names in torchvision


class Pictures(LazyImages):
    """The pictures of a torchvision data set, which are read when they are accessed.

    Args:
        dataset: a data set of pairs: a picture and its label.
        size: the height and width in pixels; see `pixels.fitted`.
        index: the positions of the pictures in the data set.
    """

    def __init__(self, dataset: Any, size: int, index: list[int]) -> None:
        self.dataset, self.size, self.index = dataset, size, index
        self.shape = len(index), 3, size, size

    def item(self, number: int) -> tuple[Tensor, int]:
        """Return an image, uint8 [3, size, size], and its label.

        Raises:
            UserError: the item cannot be read, or it is not a picture with a whole number as its label.
        """
        try:
            picture, label = self.dataset[self.index[number]]
            return pil_to_tensor(fitted(as_image(picture), self.size)), operator.index(label)
        except Exception as error:  # decoders raise many types
            problem = f"data.name={type(self.dataset).__name__}: item {self.index[number]} is not a readable picture"
            remedy = "Choose another set, or delete the folder data.root to download this set again"
            raise UserError(f"{problem} with a whole number as its label ({reason(error)}). {remedy}.") from error

    def __getitem__(self, index: int | slice | Tensor) -> "Tensor | Pictures":
        if isinstance(index, int):
            return self.item(index)[0]
        return Pictures(self.dataset, self.size, torch.tensor(self.index)[index].tolist())

    def read(self) -> Tensor:
        return self.read_all()["images"]

    def empty(self, with_images: bool = True, device: str | None = None) -> dict[str, Tensor]:
        """Return tensors for the images, uint8 [N, 3, size, size] (N = 0 without images), and the labels, int64 [N]."""
        count, *shape = self.shape
        shape = count if with_images else 0, *shape
        images = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
        return {"images": images, "labels": torch.empty(count, dtype=torch.int64, device=device)}

    def read_all(self, with_images: bool = True) -> dict[str, Tensor]:
        """Read all pictures in several threads; return the tensors of `empty`."""
        content, numbers = self.empty(with_images), range(len(self.index))

        with ThreadPoolExecutor(cores()) as pool:
            bar = tqdm(pool.map(self.item, numbers), "Reading images", len(numbers), unit=" images", mininterval=0.5)
            for number, (image, label) in enumerate(bar):
                content["labels"][number] = label
                content["images"][number : number + 1] = image  # nothing without images
        return content


class Torchvision(ImageFolder):
    """A torchvision data set of pictures with whole numbers as labels, downloaded once into `root`.

    It is split as the set is: into training and test images and, if the set has them, validation images. Without test
    images, as in ImageNet, the validation images are used for the test. Images are converted and cached as those of
    `ImageFolder`.

    Args:
        name: the name of a class in `torchvision.datasets`, such as "SVHN".
        root: the folder in which torchvision stores the files of the set.
        arguments: other arguments of the class, such as {"split": "letters"} for EMNIST.
        settings: the settings of `ImageFolder`.

    Raises:
        NoImages: `root` does not contain the set, and `read_only` is set.
        UserError: the set does not exist, cannot be downloaded, or has no training or test images.
    """

    def __init__(self, name: str, root: str, arguments: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(root, **settings)
        self.source_name, self.arguments = name, dict(arguments or {})

    def read(self) -> Source:
        sets = self._sets()
        splits = {part: self._split(dataset, self.parts[part]) for part, dataset in sets.items()}
        present = torch.cat([split.labels for split in splits.values()]).unique()  # EMNIST's letters start at 1
        for split in splits.values():
            split.labels = torch.searchsorted(present, split.labels)
        names = getattr(sets["train"], "classes", None) or range(int(present.max()) + 1)
        found = (names[label] for label in present.tolist())
        class_names = [str(name[0] if isinstance(name, tuple) else name) for name in found]  # of ImageNet's synonyms
        return Source(class_names, splits["train"], splits["test"], splits.get("val"))

    def read_test(self) -> Split:
        """Return the test images with the labels of the set; the other images are not read."""
        return self._split(self._sets()["test"], self.parts["test"])

    def _sets(self) -> dict[str, Any]:
        """Check the settings, and return the parts of the set, which is downloaded if necessary."""
        if (name := self.source_name) not in datasets.__all__:
            remedy = did_you_mean(name, datasets.__all__) or " Choose a class of torchvision.datasets."
            raise UserError(f"data.name={name} is not a data set of torchvision.{remedy}")
        self.make: Any = getattr(datasets, name)
        check_arguments("data.arguments", self.make, self.arguments)
        self.parts = _parts(self.make)
        if not {"train", "test"} <= self.parts.keys():
            raise UserError(f"data.name={name} has no training and test images. Choose another set or a folder.")
        for key in self.arguments.keys() & {"root", "download", "transform"}.union(*self.parts.values()):
            raise UserError(f"data.arguments.{key} cannot be set. Remove it, or use data.root or data.transforms.")
        missing = f"{self.root} does not contain {name}" if self.read_only else None
        return find_or_fetch(name, self.root.parent, self._open, self._fetch, missing)

    def _open(self) -> dict[str, Any]:
        """Return the parts of the set, or nothing if they can be downloaded and are missing or damaged."""
        with as_user_error(f"data.name={self.source_name} data.arguments={self.arguments}"):
            try:
                return {part: self.make(self.root, **self.arguments, **split) for part, split in self.parts.items()}
            except (RuntimeError, OSError) as error:
                if isinstance(error.__context__, ImportError) or not accepts(self.make, "download"):  # such as h5py
                    raise RuntimeError(reason(error)) from error
                return {}

    def _fetch(self) -> None:
        """Download the set into a scratch folder, then rename it: `root` is always complete."""
        if self.root.is_dir() and any(self.root.iterdir()):
            problem = f"data.root={self.root} contains files, but not all of {self.source_name} {self.arguments or ''}"
            raise UserError(f"{problem.rstrip()}. Set data.root to a new folder, to which the set is downloaded.")
        remedies = (
            f"  - manually: run this command on a computer with a network connection, and copy its {self.root}\n"
            "  - offline: use a folder of images, or train on synthetic images: +experiment=quickstart"
        )
        with scratch_folder(self.root.parent) as scratch:
            with downloading(f"{self.source_name} cannot be downloaded", remedies):
                for split in self.parts.values():
                    self.make(scratch / self.root.name, **self.arguments, **split, download=True)
            (scratch / self.root.name).rename(self.root)

    def _split(self, dataset: Any, selected: Mapping[str, Any]) -> Split:
        """Read a part of the set, or its cache; if images are streamed, only the labels are read and cached."""
        pictures = Pictures(dataset, self.size, [*range(len(dataset))])
        expected = pictures.empty(self.in_memory, "meta")
        key = f"{self.root} {self.source_name} {self.arguments} {selected} {self.in_memory}"
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file() and path.name != ".lock")
        content = cached(key, map(str, files), expected, partial(pictures.read_all, self.in_memory), not self.read_only)
        return Split(content["images"] if self.in_memory else pictures, content["labels"])


def _parts(make: Any) -> dict[str, dict[str, Any]]:
    """Return the arguments of a torchvision class that select each part of its data set."""
    if accepts(make, "train"):
        return {"train": {"train": True}, "test": {"train": False}}
    known = {part: [name for name in names if _has_split(make, name)] for part, names in SPLITS.items()}
    parts: dict[str, dict[str, Any]] = {part: {"split": names[0]} for part, names in known.items() if names}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    return parts


def _has_split(make: Any, name: str) -> bool:
    """Whether a torchvision class has a split; it checks the name before it looks for files."""
    try:
        make(os.path.join(os.devnull, "nothing"), split=name)
    except Exception as error:  # of any type if the files are missing
        return accepts(make, "split") and not isinstance(error, ValueError)
    return True
