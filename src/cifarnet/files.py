"""Files that are written whole or not at all, and folders in which one process works at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cifarnet.errors import UserError


def write(path: str | Path, content: str | bytes | memoryview) -> None:
    """Beside its place, flushed to the disk, then renamed: there is the whole file, or what was there before.

    Raises:
        OSError: it could not be written, on a full disk for one; it names the file.
    """
    path, data = Path(path), content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in this folder as its only process; the lock ends with the process, however it ends.

    Raises:
        UserError: another one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except NotImplementedError:
        pass  # a file system without locks
    except Timeout as error:
        raise UserError(
            f"Another process is at work in {folder}. Wait until it ends, or choose another folder: hydra.run.dir=… "
            "(of a sweep: hydra.sweep.dir=…)"
        ) from error
    try:
        for left in folder.rglob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        yield
    finally:
        lock.release()


def remove_if_unused(folder: Path) -> None:
    """Remove a run's folder in which nothing was done but noting what was asked for."""
    noted = ("hparams.yaml", ".lock")
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".hydra"]
    header_only = [path for path in files if path.name.startswith("events.out.") and path.stat().st_size < 100]
    if all(path.name in noted or path.suffix == ".log" or path in header_only for path in files):
        shutil.rmtree(folder, ignore_errors=True)
