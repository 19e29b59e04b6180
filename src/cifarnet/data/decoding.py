"""Decode many pictures to the input size of a network, in several threads."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cifarnet.data import pixels
from cifarnet.errors import UserError, reason

CHUNK = 16  # the number of images in a task of a thread; one task per image would be slow for small images
Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor


def expand_folders(images: Picture | Iterable[Picture], left_out: list[str] | None = None) -> Iterator[Picture]:
    """Yield the pictures, with each folder replaced with the image files in and below it.

    If a folder cannot be read, its own path is yielded.

    Args:
        left_out: as for `image_files`.
    """
    is_single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4
    pictures: Any = images if isinstance(images, Iterable) and not is_single else [images]
    for picture in pictures:
        if isinstance(picture, str | os.PathLike) and os.path.isdir(picture):
            unreadable: list[OSError] = []
            yield from pixels.image_files(os.fspath(picture), unreadable.append, left_out)
            yield from (error.filename for error in unreadable)
        else:
            yield picture


def decode_all(
    sources: Sequence[Picture], size: int, ahead: int, workers: int
) -> Iterator[tuple[Picture, np.ndarray | str]]:
    """Yield each picture with its pixels, uint8 [size, size, 3], or with an error message if it cannot be read.

    Args:
        ahead: the number of images to decode ahead; up to about twice this number are kept.
        workers: the number of threads; Pillow releases the GIL while decoding.
    """
    large = threading.Lock()

    def read(source: Picture) -> tuple[Picture, np.ndarray | str]:
        try:
            if isinstance(source, str | os.PathLike):
                if os.path.isdir(source):
                    return source, f"The folder {os.fspath(source)} cannot be read."
                return source, np.asarray(pixels.decode(os.fspath(source), size, large))
            return source, np.asarray(pixels.fitted(pixels.as_image(source), size))
        except UserError as error:
            return source, str(error)
        except Exception as error:  # a broken image that Pillow has opened can raise many types
            return source, f"An image cannot be read ({reason(error)})."

    count = max(1, min(CHUNK, ahead, len(sources) // (4 * workers)))
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for start in range(0, len(sources), count):
            waiting.append(pool.submit(lambda part: [*map(read, part)], sources[start : start + count]))
            if len(waiting) * count >= 2 * ahead + count * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
