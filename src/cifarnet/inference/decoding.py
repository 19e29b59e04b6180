"""From what a user gives to what a network sees, by several threads."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from torch import Tensor

from cifarnet.errors import UserError

CHUNK = 16  # images that a thread decodes in one go, where there are many: small ones take less time than handing over
Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor


def listed(images: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """One, or several; those of a folder in its place.

    Raises:
        UserError: a folder cannot be read.
    """
    from cifarnet.data.pixels import image_files  # on first use, as Lightning, which it brings along

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error

    single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4
    several = not single and (isinstance(images, Iterable) or hasattr(images, "__getitem__"))
    for image in images if several else [images]:
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):
            yield from image_files(os.fspath(image), unreadable)
        else:
            yield image


def decoded(
    sources: Sequence[Picture], size: int, ahead: int, workers: int
) -> Iterator[tuple[Picture, np.ndarray | str]]:
    """Each source with its pixels, uint8 [size, size, 3], or why it cannot be read; in order, by `workers` threads
    (Pillow decodes outside the interpreter's lock). About twice `ahead` images, and no more, wait to be taken."""
    from cifarnet.data.pixels import as_image, decode, fitted

    large = threading.Lock()

    def read(source: Picture) -> tuple[Picture, np.ndarray | str]:
        try:
            if isinstance(source, str | os.PathLike):
                return source, np.asarray(decode(os.fspath(source), size, large))
            return source, np.asarray(fitted(as_image(source), size))
        except UserError as error:
            return source, str(error)
        except Exception as error:  # whatever Pillow makes of an image that it opened before
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
