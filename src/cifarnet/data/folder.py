"""Any tree of image files: `train/<class>/…`, `test/<class>/…` and an optional `val/<class>/…`."""

import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.data.loader import LazyImages
from cifarnet.errors import UserError
from cifarnet.hardware import cores

CACHE_FORMAT = 1  # count up when what is cached changes


class ImageFiles(LazyImages):
    """Images that are decoded when they are asked for."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size
        self.shape = len(paths), 3, size, size

    def __getitem__(self, index: int | slice | torch.Tensor) -> "torch.Tensor | ImageFiles":
        if isinstance(index, int):
            return pil_to_tensor(_decode(self.paths[index], self.size))
        chosen = torch.arange(len(self.paths))[index].tolist()
        return ImageFiles([self.paths[i] for i in chosen], self.size)

    def read(self, bar: bool = False) -> torch.Tensor:
        images = np.empty((len(self.paths), self.size, self.size, 3), np.uint8)
        with ThreadPool(cores()) as pool:  # Pillow decodes outside the interpreter's lock
            decoded = pool.imap(lambda path: _decode(path, self.size), self.paths, chunksize=16)
            shown = tqdm(decoded, "Decoding images", len(self.paths), unit=" images", mininterval=0.5, disable=not bar)
            for number, image in enumerate(shown):
                images[number] = image
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class ImageFolder(ImageDataModule):
    """Images in folders named after their class, decoded once and cached for the next start.

    Images of another size are scaled and cropped at the centre to a square; all become RGB. The cache lies
    outside the tree (`~/.cache/cifarnet`, or `$CIFARNET_CACHE`) and is made anew when a file of the tree was
    added, removed or changed (by name, size or time of modification).

    Args:
        root: the folder that holds `train/` and `test/`.
        image_size: height and width in pixels.
        in_memory: decode all images at the start; else each when it is needed, by `workers` processes (None: one a
            core), every epoch anew and without a cache, for data that does not fit in memory.
        settings: those of `ImageDataModule`.

    Raises:
        UserError: a folder is missing or empty, `test/` or `val/` has a class that `train/` lacks, an image cannot be
            read. The message names the file or folder.
    """

    def __init__(
        self, root: str, image_size: int = 32, in_memory: bool = True, workers: int | None = None, **settings
    ) -> None:
        super().__init__(**settings)
        if image_size < 1:
            raise UserError(f"data.{image_size=}: give the height and width in pixels, such as 32")
        self.root = Path(root).expanduser().resolve()
        self.size, self.in_memory = image_size, in_memory
        self.workers = cores() if workers is None else workers

    def read(self) -> Source:
        for name in ("train", "test"):
            if not (self.root / name).is_dir():
                raise UserError(
                    f"data.root={self.root} has no folder {name}/. Expected: train/<class>/…, test/<class>/… "
                    "and, if you like, val/<class>/…"
                )
        class_names = _subfolders(self.root / "train")
        if len(class_names) < 2:
            raise UserError(f"{self.root / 'train'} has {len(class_names)} class folders: at least two are needed.")
        files = {name: self._list(name, class_names) for name in ("train", "val", "test")}
        paths, labels = zip(*itertools.chain(*files.values()), strict=True)
        images = ImageFiles(paths, self.size)
        everything = Split(self._decoded(images) if self.in_memory else images, torch.tensor(labels))
        splits, start = {}, 0
        for name, listed in files.items():
            splits[name] = everything[start : start + len(listed)] if listed else None
            start += len(listed)
        return Source(class_names, **splits)

    def _list(self, split: str, class_names: list[str]) -> list[tuple[str, int]]:
        """The image files of train, val or test and their labels, by class and path. Without val/: none."""
        if not (self.root / split).is_dir():
            return []
        files = []
        for name in _subfolders(self.root / split):
            folder = self.root / split / name
            if name not in class_names:
                raise UserError(
                    f"{folder}: the class {name!r} is in {split}/ but not in train/. "
                    f"Add {self.root / 'train' / name}, or remove this folder."
                )
            found = sorted(_image_files(folder))
            if not found:
                raise UserError(f"{folder} holds no images. Add some ({', '.join(IMG_EXTENSIONS)}) or remove it.")
            files += [(path, class_names.index(name)) for path in found]
        if not files:
            raise UserError(f"{self.root / split} has no class folders. Add {split}/<class>/… or remove it.")
        return files

    def _decoded(self, files: ImageFiles) -> torch.Tensor:
        """All images, uint8 [N, 3, size, size]: from the cache where it is up to date."""
        needed = 2 * 3 * self.size**2 * len(files.paths)  # bytes; a second time while the splits are made
        if needed > (free := psutil.virtual_memory().available):
            raise UserError(
                f"{len(files.paths):,} images of {self.size}x{self.size} need {needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} GiB are free. Read them while training, with data.in_memory=false, or choose a "
                "smaller data.image_size."
            )
        header = f"{CACHE_FORMAT} {self.size} {self.root}"
        cache = _cache_folder() / f"folder-{_sha256(header)[:16]}.pt"
        stats = ((path, os.stat(path)) for path in files.paths)
        stamps = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
        fingerprint = _sha256("\n".join([header, *stamps]))
        images = _load(cache, fingerprint)
        if images is None:
            images = files.read(bar=True)
            _save(cache, {"fingerprint": fingerprint, "images": images})
        return images


def _decode(path: str, size: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return image if image.size == (size, size) else ImageOps.fit(image, (size, size))
    except Exception as error:  # whatever a broken file makes the decoder raise
        raise UserError(f"{path} cannot be read as an image ({error}). Repair or remove it.") from None


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: str | Path) -> Iterator[str]:
    """Every image below the folder."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _image_files(entry.path)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield entry.path


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _cache_folder() -> Path:
    name, usual = ("LOCALAPPDATA", "~/AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("CIFARNET_CACHE", Path(os.environ.get(name, usual), "cifarnet"))).expanduser()


def _load(cache: Path, fingerprint: str) -> torch.Tensor | None:
    """The cached images, or None where there are none, or others, or the file is damaged."""
    try:
        cached = torch.load(cache, weights_only=True)
        return cached["images"] if cached["fingerprint"] == fingerprint else None
    except Exception:
        return None


def _save(cache: Path, content: dict) -> None:
    """Write under a temporary name, then rename. A cache that cannot be written is only a slower next start."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".tmp", delete=False) as file:
            torch.save(content, file)
        os.replace(file.name, cache)
    except OSError as error:
        tqdm.write(f"The decoded images could not be cached in {cache.parent}: {error}", file=sys.stderr)
