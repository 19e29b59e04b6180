"""Files that are written whole or not at all, and folders in which one process works at a time."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil
from filelock import FileLock, Timeout

from cifarnet.errors import UserError


def write(path: str | Path, content: str | bytes | memoryview) -> None:
    """As `atomic_file` does."""
    with atomic_file(Path(path)) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write beside its place, flush to the disk, then rename: there is the whole file, or what was there before.

    Raises:
        OSError: it could not be written, on a full disk for one; it names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def make_folder(folder: Path, told: str) -> None:
    """Make a folder that the user chose, and those above it.

    Raises:
        UserError: `told`, and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{told} ({error.strerror}). Choose another.") from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Work in this folder as its only process.

    Raises:
        UserError: another one is at work there.
    """
    with locked(folder):
        for path in folder.rglob(".*.tmp"):  # by a process that was killed while it wrote
            left = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
            if left and not psutil.pid_exists(int(left[1])) and path.is_file():
                path.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def locked(folder: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the lock of a folder, which is made; it ends with the process, however it ends.

    Args:
        waiting: what to print before waiting for a process that holds it; None: it is refused.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0.2)  # `is_locked` may hold it, for a moment
    except NotImplementedError:
        pass  # a file system without locks
    except Timeout as error:
        if waiting is None:
            raise UserError(
                f"Another process is at work in {folder}. Wait until it ends, or choose another folder: "
                "hydra.run.dir=… (of a sweep: hydra.sweep.dir=…)"
            ) from error
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked(lock: Path) -> bool:
    """Does another process hold this lock?"""
    try:
        with FileLock(lock).acquire(blocking=False) if lock.exists() else contextlib.nullcontext():
            return False
    except (OSError, NotImplementedError) as error:  # the others: another user's, or a file system without locks
        return isinstance(error, Timeout)


def remove_if_unused(folder: Path) -> None:
    """Remove a run's folder in which nothing was done but noting what was asked for, and no file that another made."""
    names = {"train.log", ".lock", *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides"))}

    def noted(path: Path) -> bool:
        header_only = path.name.startswith("events.out.") and path.lstat().st_size < 100
        return header_only or path.name == "hparams.yaml" or path.relative_to(folder).as_posix() in names

    found = sorted(folder.rglob("*"), reverse=True)
    files = [path for path in found if path.is_symlink() or not path.is_dir()]
    if all(map(noted, files)):
        for path in files:
            path.unlink(missing_ok=True)
        for place in [*(path for path in found if path not in files), folder]:
            with contextlib.suppress(OSError):
                place.rmdir()


def refuse_links(folder: Path, among: Iterable[Path] | None = None) -> None:
    """Refuse a folder, of a stranger's maybe, in which writing would write elsewhere.

    Args:
        among: the paths to look at; None: all in it.

    Raises:
        UserError: one is a link that leads out of the folder.
    """
    for path in folder.rglob("*") if among is None else among:
        if path.is_symlink() and folder.resolve() not in path.resolve().parents:
            raise UserError(f"{path} is a link that leads out of {folder}. Remove it, or put there what it leads to.")
