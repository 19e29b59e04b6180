"""Any tree of image files: `train/<class>/…`, `test/<class>/…` and an optional `val/<class>/…`."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.errors import UserError
from cifarnet.hardware import cores

CACHE_FORMAT = 1  # count up when what is cached changes
CHUNK = 64  # images a thread decodes before the progress bar hears of it


class ImageFile(NamedTuple):
    path: str
    label: int
    stamp: str  # size and time of modification


class ImageFiles:
    """Images that are decoded when they are asked for."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths = paths
        self.size = size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | torch.Tensor) -> "torch.Tensor | ImageFiles":
        if isinstance(index, int):
            return torch.from_numpy(np.array(_decode(self.paths[index], self.size))).permute(2, 0, 1)
        chosen = torch.arange(len(self))[index].tolist()
        return ImageFiles([self.paths[i] for i in chosen], self.size)


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
        UserError: a folder is missing or empty, `test/` or `val/` has a class that `train/` lacks, an image
            cannot be read. The message names the file or folder.
    """

    def __init__(
        self, root: str, image_size: int = 32, in_memory: bool = True, workers: int | None = None, **settings
    ) -> None:
        super().__init__(**settings)
        if image_size < 1:
            raise UserError(f"data.image_size={image_size}: give the height and width in pixels, such as 32")
        self.root = Path(root).expanduser().resolve()
        self.size = image_size
        self.in_memory = in_memory
        self.workers = cores() if workers is None else workers

    def read(self) -> Source:
        class_names = self._class_names()
        files = {name: self._list(name, class_names) for name in ("train", "val", "test")}
        images = {name: ImageFiles([file.path for file in listed], self.size) for name, listed in files.items()}
        if self.in_memory:
            images = dict(zip(files, self._decoded(files), strict=True))
        splits = {}
        for name, listed in files.items():
            labels = torch.tensor([file.label for file in listed])
            splits[name] = Split(images[name], labels) if listed else None
        return Source(class_names, **splits)

    def _decoded(self, files: dict[str, list[ImageFile]]) -> tuple[torch.Tensor, ...]:
        """The images of each split, uint8 [N, 3, size, size]: from the cache where it is up to date."""
        everything = [file for listed in files.values() for file in listed]
        needed = 2 * 3 * self.size**2 * len(everything)  # bytes; a second time while the splits are made
        if needed > (free := psutil.virtual_memory().available):
            raise UserError(
                f"{len(everything):,} images of {self.size}x{self.size} need {needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} GiB are free. Read them while training, with data.in_memory=false, or choose a "
                "smaller data.image_size."
            )

        header = f"{CACHE_FORMAT} {self.size} {self.root}"
        cache = _cache_folder() / f"folder-{_sha256(header)[:16]}.pt"
        fingerprint = _sha256("\n".join([header, *(f"{file.path} {file.stamp}" for file in everything)]))
        images = _load(cache, fingerprint)
        if images is None:
            images = self._decode([file.path for file in everything])
            _save(cache, {"fingerprint": fingerprint, "images": images})

        return images.split([len(listed) for listed in files.values()])

    def _class_names(self) -> list[str]:
        for name in ("train", "test"):
            if not (self.root / name).is_dir():
                raise UserError(
                    f"data.root={self.root} has no folder {name}/. Expected: train/<class>/…, test/<class>/… "
                    "and, if you like, val/<class>/…"
                )
        class_names = _subfolders(self.root / "train")
        if len(class_names) < 2:
            raise UserError(f"{self.root / 'train'} has {len(class_names)} class folders: at least two are needed.")
        return class_names

    def _list(self, split: str, class_names: list[str]) -> list[ImageFile]:
        """The image files of train, val or test, sorted by class and path. Without val/: none."""
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
            found = sorted(_image_files(folder, class_names.index(name)))
            if not found:
                raise UserError(f"{folder} holds no images. Add some ({', '.join(IMG_EXTENSIONS)}) or remove it.")
            files += found
        if not files:
            raise UserError(f"{self.root / split} has no class folders. Add {split}/<class>/… or remove it.")
        return files

    def _decode(self, paths: list[str]) -> torch.Tensor:
        """uint8 [N, 3, size, size]."""
        images = np.empty((len(paths), self.size, self.size, 3), np.uint8)

        def decode(start: int) -> int:
            chunk = paths[start : start + CHUNK]
            for number, path in enumerate(chunk, start):
                images[number] = _decode(path, self.size)
            return len(chunk)

        with (
            ThreadPoolExecutor() as pool,  # Pillow decodes outside the interpreter's lock
            tqdm(total=len(paths), desc="Decoding images", unit=" images", mininterval=0.5) as bar,
        ):
            for count in pool.map(decode, range(0, len(paths), CHUNK)):
                bar.update(count)
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def _decode(path: str, size: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return image if image.size == (size, size) else ImageOps.fit(image, (size, size))
    except Exception as error:  # whatever a broken file makes the decoder raise
        raise UserError(f"{path} cannot be read as an image ({error}). Repair or remove it.") from None


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: str | Path, label: int) -> Iterator[ImageFile]:
    """Every image below the folder."""
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _image_files(entry.path, label)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            stat = entry.stat()
            yield ImageFile(entry.path, label, f"{stat.st_size} {stat.st_mtime_ns}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _cache_folder() -> Path:
    if "CIFARNET_CACHE" in os.environ:
        return Path(os.environ["CIFARNET_CACHE"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "cifarnet"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cifarnet"


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
