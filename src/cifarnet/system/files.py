"""Atomic writes, bounded reads, downloads and folder locks."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil
from filelock import FileLock, Timeout

from cifarnet.errors import NoImages, UserError, reason

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of a full or failing disk
MOST_BYTES = 64 * 2**20  # a record of ten thousand epochs has 3 MB
SCRATCH = ".unfinished-"
Content = TypeVar("Content")


def read(path: Path, parse: Callable[[str], Content], remedy: str = "") -> Content:
    """Return the parsed content of a text file, which must be a regular file of at most 64 MB.

    Args:
        remedy: the end of the error message, which says what the user can do.

    Raises:
        UserError: the file cannot be read or parsed.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError("it is larger than 64 MB")
        return parse(content.decode())
    except Exception as error:  # a damaged file can raise many types
        raise UserError(f"{path} cannot be read: {reason(error)}{remedy}.") from error


def read_tensors(path: Path) -> Any:
    """Return the content of a file that torch.save has written, on the CPU, without running code in it.

    Raises:
        Exception: of any type, if the file is damaged or contains other objects than tensors and plain data.
    """
    import torch  # takes seconds

    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("its entries are compressed or overlap")  # torch.save does neither
        damaged = archive.testzip()  # verifies the checksums that torch.save wrote
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def write(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file atomically, as `atomic_file` does. A byte that is not UTF-8, in a name, is escaped."""
    with atomic_file(Path(path)) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which is flushed to the disk and renamed at the end, so that readers see the previous file
    or the complete new one.

    Raises:
        OSError: the file could not be written; its `filename` is the path.
        UserError: the path is that of a folder, a device or a pipe.
    """
    check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # never through a link: the name is random, and must be new
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def check_output(path: Path) -> None:
    """Check that a path is that of a new or a regular file: the rename would replace a device or a pipe.

    Raises:
        UserError: the path is that of a folder, a device or a pipe.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} cannot be written: it is not a regular file. Choose another path.")


def unused(path: Path) -> Path:
    """Return a path at which nothing exists: the path itself, or the path with a number, such as comparison_2.png."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free


def make_folder(folder: Path, message: str) -> None:
    """Create a folder that the user chose, and its parents.

    Raises:
        UserError: the folder cannot be created; the error contains `message` and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{message} ({error.strerror}). Choose another path.") from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no other process uses it.

    Raises:
        UserError: another process is using the folder, or the folder was removed while it was in use.
    """
    with locked(folder):
        for path in folder.rglob(".*.tmp"):  # left by a process that was killed while writing
            left = re.fullmatch(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp", path.name)
            if left and not psutil.pid_exists(int(left[1])) and path.is_file():
                path.unlink(missing_ok=True)
        try:
            yield
        except OSError as error:
            if not (folder / ".lock").exists():
                raise UserError(f"{folder} was removed while it was in use. Run the command again.") from error
            if error.errno in DISK_ERRORS:  # without a name if a write of TensorBoard's thread failed
                error.filename = error.filename or str(folder)
            raise


@contextlib.contextmanager
def locked(folder: Path, waiting: str | None = None) -> Iterator[None]:
    """Create a folder if necessary, and hold its lock, which the system releases when the process ends.

    Args:
        waiting: the message to print before waiting for the process that holds the lock; None does not wait.

    Raises:
        UserError: another process holds the lock.
    """
    make_folder(folder, f"{folder} cannot be created")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0.2)  # `is_locked` may hold it for a moment
    except NotImplementedError:
        pass  # a file system without locks
    except Timeout as error:
        if waiting is None:
            remedy = "Wait until it ends, or choose another folder: hydra.run.dir=… (for a sweep: hydra.sweep.dir=…)"
            raise UserError(f"Another process is using {folder}. {remedy}") from error
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_or_fetch(
    name: str, folder: Path, find: Callable[[], Content], fetch: Callable[[], object], missing: str | None
) -> Content:
    """Return what `find` returns; if that is false, call `fetch` first, unless another process does.

    Args:
        name: the name of the data set.
        folder: the folder in which `fetch` stores the files; it is locked.
        missing: a description of the missing files, if they may not be fetched.

    Raises:
        NoImages: the files are missing, and they may not be fetched.
        UserError: the files cannot be stored.
    """
    if found := find():
        return found
    if missing:
        remedy = "Correct data.root, or allow the download with data.read_only=false."
        raise NoImages(f"{missing}, and data that a checkpoint chooses is not downloaded. {remedy}")
    try:
        with locked(folder, f"Another process is preparing {name} in {folder}: waiting for it."):
            if not find():
                fetch()
    except OSError as error:
        raise UserError(f"{folder}: {name} cannot be stored there ({error.strerror}). Change data.root.") from error
    return find()


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Create a temporary folder for a download, and remove those of processes that were killed."""
    for left in parent.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=SCRATCH) as folder:
        yield Path(folder)


@contextlib.contextmanager
def downloading(what: str, remedies: str) -> Iterator[None]:
    """Report the errors of a download, of which urllib, http and torchvision raise many types."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(f"{what}: {reason(error)}. Choose one:\n{remedies}") from error


def is_locked(lock: Path) -> bool:
    """Return whether another process holds this lock."""
    try:
        with FileLock(lock).acquire(blocking=False) if lock.exists() else contextlib.nullcontext():
            return False
    except (OSError, NotImplementedError) as error:  # other errors: another user's lock, or no support for locks
        return isinstance(error, Timeout)


def remove_if_unused(folder: Path) -> None:
    """Remove the folder of a run that failed before it started, if it contains only the record of the command."""
    hydra = {f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")}
    records = hydra | {".lock", "train.log", "hparams.yaml"}
    for path in folder.rglob("*"):
        is_log = path.name.startswith("events.out.") and path.stat().st_size < 100  # a header without events
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_log and not is_folder and path.relative_to(folder).as_posix() not in records:
            return
    shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoint files in the folder of a run; links and other files are kept."""
    folder = run / "checkpoints"
    for path in list(folder.rglob("*.ckpt")):
        if path.is_file() and not path.is_symlink():
            path.unlink()
    with contextlib.suppress(OSError):  # it has other files
        folder.rmdir()


def refuse_links(folder: Path, among: Iterable[Path] | None = None) -> None:
    """Check that no link in a folder would make a command write outside it.

    Args:
        among: the paths to check; None checks all paths in the folder.

    Raises:
        UserError: a link points outside the folder.
    """
    for path in folder.rglob("*") if among is None else among:
        if path.is_symlink() and folder.resolve() not in path.resolve().parents:
            raise UserError(f"{path} is a link to a place outside {folder}. Replace it with the file it points to.")
