"""Any tree of image files: `train/<class>/…`, `test/<class>/…` and an optional `val/<class>/…`."""

import hashlib
import itertools
import os
import sys
import zipfile
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from cifarnet.config import Pixels, Range, checked
from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.data.pixels import decode, image_files
from cifarnet.data.streaming import LazyImages
from cifarnet.errors import UserError
from cifarnet.system.files import atomic_file
from cifarnet.system.hardware import cores

CACHE_FORMAT = 3  # count up when what is cached changes


class ImageFiles(LazyImages):
    """Images that are decoded when they are asked for."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size
        self.shape = len(paths), 3, size, size

    def __getitem__(self, index: int | slice | torch.Tensor) -> "torch.Tensor | ImageFiles":
        if isinstance(index, int):
            return pil_to_tensor(decode(self.paths[index], self.size))
        chosen = torch.arange(len(self.paths))[index].tolist()
        return ImageFiles([self.paths[i] for i in chosen], self.size)

    def read(self, bar: bool = False) -> torch.Tensor:
        images = np.empty((len(self.paths), self.size, self.size, 3), np.uint8)
        with ThreadPool(cores()) as pool:  # Pillow decodes outside the interpreter's lock
            decoded = pool.imap(lambda path: decode(path, self.size), self.paths, chunksize=16)
            shown = tqdm(decoded, "Decoding images", len(self.paths), unit=" images", mininterval=0.5, disable=not bar)
            for number, image in enumerate(shown):
                images[number] = image
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class ImageFolder(ImageDataModule):
    """Images in folders named after their class, decoded once and cached for the next start.

    Images of another size are scaled and cropped at the centre to a square; all become RGB with 8 bits a channel, and
    what is transparent white; of an animation, the first frame is taken (see `pixels.fitted`). Hidden files, whose
    names begin with a dot, are left out. The cache lies outside the tree (`~/.cache/cifarnet`, or `$CIFARNET_CACHE`)
    and is made anew when a file of the tree was added, removed or changed (by name, size or time of modification).

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

    @checked("data")
    def __init__(
        self,
        root: str,
        image_size: Pixels = 32,
        in_memory: bool = True,
        workers: Annotated[int, Range(0, 512)] | None = None,
        **settings,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser().resolve()
        self.size, self.in_memory = image_size, in_memory
        self.workers = workers

    @property
    def validates(self) -> bool:
        return self.val_fraction > 0 or (self.root / "val").is_dir()

    def read(self) -> Source:
        try:
            return self._read()
        except OSError as error:
            raise UserError(f"data.root={self.root}: {error.filename} cannot be read ({error.strerror}).") from error

    def _read(self) -> Source:
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
            found = sorted(image_files(str(folder)))
            for path in found:
                if not os.path.isfile(path):  # reading a pipe would wait for ever
                    raise UserError(f"{path} is no file (a link to nothing, a pipe, a device). Remove it.")
            if not found:
                raise UserError(f"{folder} holds no images. Add some (.png, .jpg, .gif, .tif, .webp, …) or remove it.")
            files += [(path, class_names.index(name)) for path in found]
        if not files:
            raise UserError(f"{self.root / split} has no class folders. Add {split}/<class>/… or remove it.")
        if missing := sorted(set(class_names) - {class_names[label] for _, label in files}):
            print(f"{split}/ has no images of {', '.join(missing)}.", flush=True)
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
        images = _load(cache, fingerprint, files.shape)
        if images is None:
            images = files.read(bar=True)
            _save(cache, {"fingerprint": fingerprint, "images": images})
        return images


def _subfolders(folder: Path) -> list[str]:
    """Their names; one that cannot be shown or written down is refused."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path} is a link to nothing. Mend or remove it.")
        if entry.is_dir() and not entry.name.isprintable():
            raise UserError(
                f"{folder}: the class folder {entry.name!a} has characters that cannot be shown. Rename it."
            )
    return sorted(entry.name for entry in entries if entry.is_dir())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _cache_folder() -> Path:
    name, usual = ("LOCALAPPDATA", "~/AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("CIFARNET_CACHE", Path(os.environ.get(name, usual), "cifarnet"))).expanduser()


def _load(cache: Path, fingerprint: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The cached images, or None where there are none, or others, or the file is damaged."""
    try:
        with zipfile.ZipFile(cache) as archive:
            if archive.testzip() is not None:  # compares the checksums that torch.save wrote
                return None
        cached = torch.load(cache, weights_only=True)
        images = cached["images"]
        fits = cached["fingerprint"] == fingerprint and images.dtype == torch.uint8 and images.shape == shape
        return images if fits else None
    except Exception:
        return None


def _save(cache: Path, content: dict) -> None:
    """A cache that cannot be written is only a slower next start."""
    try:
        for left in cache.parent.glob(f".{cache.name}.*.tmp"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        with atomic_file(cache) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch raises its own where writing failed
        reason = error if isinstance(error, OSError) else error.__context__ or error
        tqdm.write(f"The decoded images could not be cached in {cache.parent}: {reason}", file=sys.stderr)
