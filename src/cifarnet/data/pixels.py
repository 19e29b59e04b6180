"""The one way from an image file, or an image in memory, to pixels: for training, evaluating and predicting alike."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from cifarnet.errors import UserError

# what Pillow reads as an image of a registered kind (no PostScript, for which it starts another program): .png -> PNG
KINDS = {
    ending: kind
    for ending, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
}
LARGE = 2**24  # pixels; decoded, they take 4 bytes each, a few times over


def decode(path: str, size: int, large: contextlib.AbstractContextManager | None = None) -> Image.Image:
    """An image file, as `fitted` makes it. Of an animation, its first frame.

    Args:
        large: a lock, held while an image of more than 2**24 pixels is decoded: of threads, one at a time does.

    Raises:
        UserError: there is no such file, it is none (reading a pipe would wait for ever), or no image that can be read.
    """
    if not os.path.isfile(path):
        if not os.path.lexists(path):
            raise UserError(f"There is no file {path}.")
        raise UserError(f"{path} is no file (a link to nothing, a folder, a pipe, a device).")
    try:
        with Image.open(path, formats=sorted(set(KINDS.values()))) as image:
            one_by_one = large if large and image.width * image.height > LARGE else contextlib.nullcontext()
            with one_by_one:
                return fitted(image, size)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{path} has more than {most:,} pixels, the most that is read. Scale it down.") from None
    except Exception as error:  # whatever a broken file makes the decoder raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Pillow says no more than the path
            reason = "of no kind that Pillow knows" if os.path.getsize(path) else "it is empty"
        raise UserError(f"{path} cannot be read as an image ({reason}). Repair or remove it.") from None


def fitted(image: Image.Image, size: int) -> Image.Image:
    """In RGB with 8 bits a channel, the way up that its EXIF data says, scaled and cropped at the centre to a square of
    `size` pixels. What is transparent shows white."""
    image = _eight_bits(ImageOps.exif_transpose(image))
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size))


def _eight_bits(image: Image.Image) -> Image.Image:
    """In RGB. Grey values of more bits are scaled, where Pillow would cut them off at 255."""
    if image.mode.startswith(("I", "F")):  # 16 bits, also where they are kept in 32; shares of white
        white = 1 if image.mode == "F" else 2**16 - 1
        values = np.asarray(image, np.float64)
        if not 0 <= values.min() <= values.max() <= white:
            raise ValueError(f"its values are from {values.min():g} to {values.max():g}, and not from 0 to {white}")
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # what lies under transparent pixels is whatever a program left there
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_image(picture: Any) -> Image.Image:
    """An image of Pillow's, or an array: [H, W] or [H, W, 1, 3 or 4] of numpy's, [1, 3 or 4, H, W] of torch's, uint8 or
    float in [0, 1], which is rounded to 8 bits; grey also uint16.

    Raises:
        UserError: it is something else.
    """
    if isinstance(picture, Image.Image):
        return picture
    kind, values = type(picture).__name__, picture
    if isinstance(picture, torch.Tensor):
        values = picture.detach().cpu()
        values = (values.permute(1, 2, 0) if values.ndim == 3 else values).numpy()
    if not isinstance(values, np.ndarray) or not (values.ndim == 2 or values.shape[2:] in [(1,), (3,), (4,)]):
        shape = f" of shape {list(picture.shape)}" if hasattr(picture, "shape") else ""
        expected = "give a path, an image of Pillow's, or an array [H, W, 3] (a tensor: [3, H, W])"
        raise UserError(f"A {kind}{shape} is no image: {expected}.")
    if values.dtype.kind == "f" and values.size and 0 <= values.min() <= values.max() <= 1:
        values = (values * 255).round().astype(np.uint8)
    if not values.size or not (values.dtype == np.uint8 or (values.dtype == np.uint16 and values.ndim == 2)):
        raise UserError(f"A {kind} of {values.dtype} is no image: give uint8, or float from 0 to 1.")
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def image_files(
    folder: str, tell: Callable[[OSError], None] | None = None, above: tuple[str, ...] = ()
) -> Iterator[str]:
    """What is named as an image in and below the folder, but for what is hidden; it need not be a file, which `decode`
    looks at. A link to a folder around it is not followed.

    Args:
        tell: what to do about a folder that cannot be read; None: raise the error.
    """
    above = (*above, os.path.realpath(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if tell is None:
            raise
        tell(error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if os.path.realpath(entry.path) not in above:
                yield from image_files(entry.path, tell, above)
        elif os.path.splitext(entry.name)[1].lower() in KINDS:
            yield entry.path
