"""Decode pictures into the pixels that a network takes, in several threads."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cifarnet.errors import UserError

CHUNK = 16  # images that a thread decodes at a time; for small images, handing over each one would take longer
Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor


def expand_folders(images: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """Yield the pictures, and in place of each folder the image files in and below it.

    A folder that cannot be read is yielded itself.
    """
    from cifarnet.data.pixels import image_files  # imports Lightning, which takes seconds

    is_single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4
    pictures: Any = images if isinstance(images, Iterable) and not is_single else [images]
    for picture in pictures:
        if isinstance(picture, str | os.PathLike) and os.path.isdir(picture):
            unreadable: list[OSError] = []
            yield from image_files(os.fspath(picture), unreadable.append)
            yield from (error.filename for error in unreadable)
        else:
            yield picture


def decode_all(
    sources: Sequence[Picture], size: int, ahead: int, workers: int
) -> Iterator[tuple[Picture, np.ndarray | str]]:
    """Yield each picture with its pixels, uint8 [size, size, 3], or with the reason why it cannot be read.

    Args:
        ahead: about twice this number of images are decoded before they are consumed.
        workers: number of threads; Pillow decodes outside the interpreter's lock.
    """
    from cifarnet.data.pixels import as_image, decode, fitted

    large = threading.Lock()

    def read(source: Picture) -> tuple[Picture, np.ndarray | str]:
        try:
            if isinstance(source, str | os.PathLike):
                if os.path.isdir(source):
                    return source, f"The folder {os.fspath(source)} cannot be read."
                return source, np.asarray(decode(os.fspath(source), size, large))
            return source, np.asarray(fitted(as_image(source), size))
        except UserError as error:
            return source, str(error)
        except Exception as error:  # Pillow raises many types for broken images that were opened before
            return source, f"An image cannot be read ({' '.join(str(error).split()) or type(error).__name__})."

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
