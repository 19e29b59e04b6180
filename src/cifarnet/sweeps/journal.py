"""A search's study as a file, into which several processes write, any of which may be killed."""

import contextlib
import os
from pathlib import Path

from filelock import FileLock


class JournalLock:
    """Optuna's lock around an append, which ends with the process, however it does; before each the journal is mended.

    Optuna's own leave a file behind where a process is killed, and the next one waits for half a minute.
    """

    def __init__(self, lock: FileLock, journal: Path) -> None:
        self.lock, self.journal = lock, journal
        with lock:
            self._mend()

    def acquire(self) -> bool:
        self.lock.acquire()
        self._mend()
        return True

    def release(self) -> None:
        self.lock.release()

    def _mend(self) -> None:
        """Cut off a last line that a killed process has not finished: nobody has read it."""
        with contextlib.suppress(FileNotFoundError), self.journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0 or (file.seek(size - 1), file.read(1))[1] == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
