"""Images in folders: `train/<class>/…`, `test/<class>/…` and optionally `val/<class>/…`."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any
from unicodedata import normalize

import numpy as np
import psutil
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.data.decoding import decode_all
from cifarnet.data.pixels import decode, describe_left_out, image_files, shown_ending
from cifarnet.data.streaming import LazyImages
from cifarnet.errors import UserError, on_one_line
from cifarnet.schema import Pixels, Range, did_you_mean
from cifarnet.system.files import atomic_file, read_tensors
from cifarnet.system.hardware import cores

AHEAD = 256  # the number of images to decode ahead
CACHE_FORMAT = 4  # increase it when the content of the cache changes


class ImageFiles(LazyImages):
    """Images that are decoded when they are accessed."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size
        self.shape = len(paths), 3, size, size

    def __getitem__(self, index: int | slice | Tensor) -> "Tensor | ImageFiles":
        if isinstance(index, int):
            return pil_to_tensor(decode(self.paths[index], self.size))
        chosen: list[int] = torch.arange(len(self.paths))[index].tolist()
        return ImageFiles([self.paths[i] for i in chosen], self.size)

    def read(self, progress_bar: bool = False) -> Tensor:
        images = np.empty((len(self.paths), self.size, self.size, 3), np.uint8)
        decoded, errors = decode_all(self.paths, self.size, AHEAD, cores()), []
        settings = {"unit": " images", "mininterval": 0.5, "disable": not progress_bar}
        bar = tqdm(decoded, "Decoding images", len(self.paths), **settings)
        for image, (_, pixels) in zip(images, bar, strict=True):
            if isinstance(pixels, str):
                errors.append(on_one_line(pixels))
            else:
                image[:] = pixels
        if errors:
            raise UserError("\n".join(errors))
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class ImageFolder(ImageDataModule):
    """Images in folders named after their class, decoded once and cached.

    Images of another size are scaled, and cropped at the center to a square. All images are converted to RGB with 8
    bits per channel, transparent pixels become white, and only the first frame of an animation is used (see
    `pixels.fitted`). Hidden files, whose names begin with a dot, are ignored. The cache is in `~/.cache/cifarnet` or
    `$CIFARNET_CACHE`. It is rebuilt when a file in `root` was added, removed or changed (according to its name, size
    and modification time).

    Args:
        root: the folder that contains `train/` and `test/`.
        image_size: the height and width in pixels.
        in_memory: decode all images at the start. If false, `workers` processes (None: one per core) decode them in
            every epoch, without a cache, for data that does not fit in memory.
        settings: the settings of `ImageDataModule`.

    Raises:
        UserError: a folder is missing or has no images, `test/` or `val/` has a class that is not in `train/`, or an
            image cannot be read.
    """

    def __init__(
        self,
        root: str,
        image_size: Pixels = 32,
        in_memory: bool = True,
        workers: Annotated[int, Range(0, 512)] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser().resolve()
        self.size, self.in_memory = image_size, in_memory
        self.workers = workers

    def read(self) -> Source:
        left_out: list[str] = []
        try:
            names = ["train", "test", *(["val"] if (self.root / "val").is_dir() else [])]
            files = {name: _class_files(self.root / name, left_out) for name in names}
        except OSError as error:
            problem = f"data.root={self.root}: {error.filename} cannot be read ({error.strerror})"
            remedy = "Put the images in train/<class>/…, test/<class>/… and optionally val/<class>/…"
            raise UserError(f"{problem}. {remedy}") from error
        if left_out:
            print(on_one_line(f"data.root={self.root}: {describe_left_out(left_out)}"), flush=True)
        class_names, folder = list(files["train"]), self.root / "train"
        if (count := len(class_names)) < 2:
            raise UserError(f"{folder} needs at least two class folders, but has {count}. Add class folders.")
        counts = Counter(map(str.casefold, class_names))
        if alike := [name for name in class_names if counts[name.casefold()] > 1]:
            print(f"train/ has classes whose names differ only in case: {', '.join(alike)}.", flush=True)
        splits, errors = {}, []
        for name in names:
            try:
                splits[name] = self._split(name, class_names, files[name])
            except UserError as error:  # all of them are reported together
                errors.append(str(error))
        if errors:
            raise UserError("\n".join(errors))
        start = len(os.path.join(self.root, ""))
        relative = {name: [path[start:] for paths in part.values() for path in paths] for name, part in files.items()}
        return Source(class_names, **splits, files=relative)

    def _split(self, name: str, class_names: list[str], files: dict[str, list[str]]) -> Split:
        """Return the images and labels of train, val or test from the files of each class, sorted by class and path."""
        folder = self.root / name
        paths, labels = [], []
        for class_name, found in files.items():
            if class_name not in class_names:
                suggestion = did_you_mean(class_name, class_names)
                problem = f"{folder / class_name} is not a class of train/.{suggestion}"
                raise UserError(f"{problem} Add it there, or rename or remove this folder.")
            paths += found
            labels += [class_names.index(class_name)] * len(found)
        missing = ", ".join(class_names[label] for label in sorted(set(range(len(class_names))) - set(labels)))
        if missing and (name == "train" or not paths):
            formats = ".png, .jpg, .gif, .tif, .webp, …"
            raise UserError(f"{folder} has no images ({formats}) of {missing}. Add some or remove the class.")
        if missing:
            print(f"{name}/ has no images of {missing}.", flush=True)
        images = ImageFiles(paths, self.size)
        if not self.in_memory:
            return Split(images, torch.tensor(labels))
        expected = {"images": torch.empty(images.shape, dtype=torch.uint8, device="meta")}
        content = cached(
            str(folder), paths, expected, lambda: {"images": images.read(progress_bar=True)}, not self.read_only
        )
        return Split(content["images"], torch.tensor(labels))


def cached(
    key: str, paths: Iterable[str], expected: dict[str, Tensor], read: Callable[[], dict[str, Tensor]], writes: bool
) -> dict[str, Tensor]:
    """Return the result of `read`, such as a split's images, from the cache if it is up to date.

    Args:
        key: the place of the images, which determines the file of the cache.
        paths: the files that are read. The cache is outdated if their names, sizes or modification times changed.
        expected: tensors with the names, shapes and types of the result.
        writes: update the cache.

    Raises:
        UserError: the images do not fit in memory.
    """
    count, _, _, size = expected["images"].shape
    needed = 2 * expected["images"].numel()  # bytes; the validation split makes a copy
    if needed > (free := psutil.virtual_memory().available):
        sizes = f"{needed / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free"
        remedy = "Use data.in_memory=false or a smaller data.image_size."
        raise UserError(f"{count:,} images of {size}×{size} pixels need {sizes}. {remedy}")
    header = f"{CACHE_FORMAT} {size} {key}"
    cache = _cache_folder() / f"folder-{_sha256(header)[:16]}.pt"
    stats = ((path, os.stat(path)) for path in paths if os.path.exists(path))  # no dangling links
    lines = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    fingerprint = _sha256("\n".join([header, *lines]))
    content = _load(cache, fingerprint, expected)
    if content is None:
        content = read()
        if writes:
            _save(cache, {"fingerprint": fingerprint, **content})
    return content


def _class_files(folder: Path, left_out: list[str]) -> dict[str, list[str]]:
    """Return the sorted paths of the images of each class.

    The names of the classes are in Unicode's composed form (NFC): file systems differ in the form that they store.

    Args:
        left_out: a list to which the endings of files that are not used are appended.
    """
    classes: dict[str, list[str]] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not os.path.isdir(entry.path):  # nor a link that loops
            left_out += [f"{ending} beside the class folders" for ending in shown_ending(entry.name)]
        elif not entry.name.startswith("."):
            if not entry.name.isprintable():  # tables and records could not contain it
                raise UserError(f"{folder}: the class folder {entry.name!a} has unprintable characters. Rename it.")
            classes.setdefault(normalize("NFC", entry.name), []).extend(image_files(entry.path, left_out=left_out))
    return {name: sorted(paths) for name, paths in sorted(classes.items())}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _cache_folder() -> Path:
    name, default = ("LOCALAPPDATA", "~/AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("CIFARNET_CACHE", Path(os.environ.get(name, default), "cifarnet"))).expanduser()


def _load(cache: Path, fingerprint: str, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the cached tensors, or None if the cache is missing, outdated or damaged."""
    try:
        content = read_tensors(cache)
        pairs = [(content[name], like) for name, like in expected.items()]
        fits = all(found.dtype == like.dtype and found.shape == like.shape for found, like in pairs)
        return content if fits and content["fingerprint"] == fingerprint else None
    except Exception:  # the file may contain anything
        return None


def _save(cache: Path, content: dict[str, Any]) -> None:
    """Write the cache, or print why it cannot be written, which only makes the next start slower."""
    try:
        for path in cache.parent.glob(f".{cache.name}.*.tmp"):  # left by processes that were killed
            path.unlink(missing_ok=True)
        with atomic_file(cache) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError while it handles an OSError
        reason = error.__context__ or error
        tqdm.write(f"The decoded images cannot be cached in {cache.parent}: {reason}", file=sys.stderr)
