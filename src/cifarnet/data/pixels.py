"""Decode image files and arrays, in the same way for training, evaluation and prediction."""

import collections
import contextlib
import mimetypes
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from cifarnet.errors import UserError, reason

# Pillow's formats by file extension, without PostScript, for which Pillow starts another program
FORMATS = {
    extension: name
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and Image.MIME.get(name, "").startswith("image/")
}
LARGE = 2**24  # pixels; decoding needs several times 4 bytes per pixel


def decode(path: str, size: int, large: contextlib.AbstractContextManager | None = None) -> Image.Image:
    """Read an image file, or the first frame of an animation, and apply `fitted`.

    Args:
        large: a lock that is held while an image with more than 2**24 pixels is decoded, so that only one thread
            decodes such an image at a time.

    Raises:
        UserError: the file does not exist, is not a regular file, or cannot be read as an image.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait forever
            raise ValueError("it is not a regular file")
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            is_large = image.width * image.height > LARGE
            with large if large and is_large else contextlib.nullcontext():
                return fitted(image, size)
    except Exception as error:  # decoders raise many types for broken files
        problem = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{path} cannot be read as an image ({problem}). Replace or remove it.") from None


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel, rotate it according to its EXIF data, and scale and crop it at
    the center to a square of `size` pixels. Transparent pixels become white."""
    image = _to_rgb(ImageOps.exif_transpose(image))
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. Gray values of more than 8 bits are scaled; Pillow would clip them at 255."""
    if image.mode.startswith(("I", "F")):  # 16-bit integers (possibly stored in 32 bits), or floats from 0 to 1
        white = 1 if image.mode == "F" else 2**16 - 1
        values = np.asarray(image, np.float64)
        if not 0 <= values.min() <= values.max() <= white:
            raise ValueError(f"its values range from {values.min():g} to {values.max():g}, not from 0 to {white}")
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_image(picture: Any) -> Image.Image:
    """Convert an array to a Pillow image; return a Pillow image unchanged.

    Args:
        picture: a Pillow image; a numpy array [H, W] or [H, W, 1, 3 or 4]; or a tensor [H, W] or [1, 3 or 4, H, W].
            Values are uint8, or float in [0, 1], which are rounded to 8 bits; gray values may be uint16.

    Raises:
        UserError: the value is not an image.
    """
    if isinstance(picture, Image.Image):
        return picture
    values = picture
    if isinstance(picture, torch.Tensor):
        values = picture.detach().cpu().numpy()
        values = values.transpose(1, 2, 0) if values.ndim == 3 else values
    is_array = isinstance(values, np.ndarray) and (values.ndim == 2 or values.shape[2:] in [(1,), (3,), (4,)])
    if is_array and values.size and values.dtype.kind == "f" and 0 <= values.min() <= values.max() <= 1:
        values = (values * 255).round().astype(np.uint8)
    is_uint8 = is_array and (values.dtype == np.uint8 or (values.dtype == np.uint16 and values.ndim == 2))
    if not is_uint8 or not values.size:
        details = "".join(f", {name} {getattr(picture, name)}" for name in ("shape", "dtype") if hasattr(picture, name))
        raise UserError(
            f"A value of type {type(picture).__name__}{details} is not an image: use a path, a Pillow image, or an "
            "array [H, W, 3] (a tensor: [3, H, W]) of uint8, or of floats from 0 to 1."
        )
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def image_files(
    folder: str, on_error: Callable[[OSError], None] | None = None, left_out: list[str] | None = None
) -> Iterator[str]:
    """Yield the paths of all image files in and below a folder, by their extensions, except hidden files.

    Links to folders are followed, except to folders that were already visited.

    Args:
        on_error: called with the error if a folder cannot be read; None raises it.
        left_out: a list to which the endings of all other files are appended, for `describe_left_out`.
    """

    def reraise(error: OSError) -> None:
        raise error

    visited = set()
    for parent, folders, names in os.walk(folder, onerror=on_error or reraise, followlinks=True):
        visited.add(os.path.realpath(parent))
        shown = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in shown if os.path.realpath(os.path.join(parent, name)) not in visited]
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in FORMATS:
                yield os.path.join(parent, name)
            elif left_out is not None:
                left_out += shown_ending(name)


def shown_ending(name: str) -> list[str]:
    """Return a list with the ending of a file's name if it could be a picture; otherwise, an empty list.

    Hidden files, files of operating systems, and files of known other types, such as .txt, are not pictures.
    """
    ending = os.path.splitext(name)[1].lower()
    is_of_system = name.startswith(".") or ending in (".db", ".ini") or name == "Icon\r"  # Thumbs.db, desktop.ini
    kind = mimetypes.MimeTypes().guess_type(f"x{ending}")[0] or "image/unknown"
    return [] if is_of_system or not kind.startswith("image/") else [ending or "without an ending"]


def describe_left_out(endings: list[str]) -> str:
    """Return a sentence with the number of files that were left out, and their most frequent endings."""
    counted = collections.Counter(endings).most_common()
    parts = [f"{count:,} {ending}" for ending, count in counted[:5]] + ["…"] * (len(counted) > 5)
    return f"{len(endings):,} file{'s' * (len(endings) > 1)} left out: {', '.join(parts)}."
