"""The storage of a search's study: a file, for processes that share the search's folder, or a database.

Both classes have the same interface. They extend Optuna's storages, so that trials of dead processes can continue.
"""

import contextlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import Any

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from cifarnet import cli
from cifarnet.errors import TakenOver, UserError, printable
from cifarnet.system import files

FOLDER = "folder"  # an attribute of trials in a database: the machine and the folder where a trial runs
PATIENCE = 300  # seconds to wait for a database that restarts
PASSWORD = r"^[^/]*://[^/@:]*:[^@]+@|[?&]\w*passw(or)?d="


def trial_id(trial: Trial | FrozenTrial) -> int:
    """Return the key of a trial in its storage, which is private in Optuna."""
    return trial._trial_id


class Journal(JournalStorage):
    """Optuna's journal storage, a file.

    Attributes:
        lock: held while a process draws a trial.
        study_name: the name of the only study in the file; the folder may have been renamed since it began.
        timeout: the seconds without a heartbeat after which a trial that runs outside the folder is dead.
        place: the value of a trial's attribute `FOLDER` if it runs in this folder.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "study.journal"
        self.lock, self.timeout, self.place = FileLock(folder / "study.lock"), 0, ""
        with self.lock:
            try:
                super().__init__(JournalFileBackend(str(path), RepairingLock(self.lock, path)))
            except Exception as error:  # a damaged file can raise many types
                remedy = "Delete it, or choose another folder with hydra.sweep.dir=…"
                raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}. {remedy}") from error
            names = [study.study_name for study in self.get_all_studies()]
        self.study_name = names[0] if names else folder.name

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the process of a running trial, which has no lock in the folder, has died."""
        return True

    def take_lease(self, trial_id: int) -> None:
        """Do nothing: the lock in the folder shows that a trial is running."""

    def check_lease(self, trial_id: int) -> None:
        """Raise `TakenOver` if another process has taken over a trial that this process runs."""

    def heartbeat(self, trial: Trial | FrozenTrial) -> contextlib.AbstractContextManager[None]:
        """Return a context that records the heartbeats of a trial that this process runs."""
        return contextlib.nullcontext()

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that raises a UserError if the connection is lost."""
        return contextlib.nullcontext()


class RepairingLock(JournalFileOpenLock):
    """A lock for writing to a journal. It ends with its process, and repairs the file after a killed process.

    Optuna's own locks are files that a killed process leaves behind; the next process would wait half a minute.
    """

    def __init__(self, lock: FileLock, journal: Path) -> None:
        self.lock, self.journal = lock, journal

    def acquire(self) -> bool:
        self.lock.acquire()
        content = self.journal.read_bytes()
        os.truncate(self.journal, content.rfind(b"\n") + 1)  # removes an unfinished line, which no process has read
        return True

    def release(self) -> None:
        self.lock.release()


class Database(RDBStorage):
    """Optuna's storage in a database. It waits while the database restarts.

    Optuna keeps a heartbeat for each trial, but only `Study.optimize` records heartbeats, and it cannot continue a
    trial whose process has died.

    Args:
        url: the address of the database.
        folder: the search's folder on this machine.
        study_name: the study's name in the database.
        interval: the seconds between the heartbeats of a trial. A trial without a heartbeat for twice as long is dead.
    """

    def __init__(self, url: URL, folder: Path, study_name: str, interval: int) -> None:
        self.address = url.set(query={}).render_as_string()
        self.lock, self.study_name = FileLock(folder / "study.lock"), study_name
        self.interval, self.timeout = interval, 2 * interval
        self.down_since: float | None = None
        url_with_password = url.render_as_string(hide_password=False)
        super().__init__(
            url_with_password, {"pool_pre_ping": True}, heartbeat_interval=interval, grace_period=self.timeout
        )
        event.listen(self.engine, "do_connect", self._connect)  # after the first connection, which fails at once
        self.place = _unique_name(folder)

    def _connect(self, dialect: Any, record: Any, arguments: tuple, settings: dict[str, Any]) -> Any:
        """Connect to the database. If it is down, the main thread waits until it is up again."""
        while True:
            try:
                connection = dialect.connect(*arguments, **settings)
                self.down_since = None
                return connection
            except dialect.loaded_dbapi.OperationalError as error:
                if current_thread() is not main_thread():
                    raise
                if self.down_since is None:
                    self.down_since = time.monotonic()
                    print(printable(f"{self.address}: {_reason(error)} Trying again for {PATIENCE} s."), flush=True)
                if time.monotonic() >= self.down_since + PATIENCE:
                    raise
                time.sleep(1)

    def is_dead(self, trial: FrozenTrial) -> bool:
        if trial.user_attrs.get(FOLDER) == self.place:
            return True
        study_id = self.get_study_id_from_name(self.study_name)
        return trial_id(trial) in self._get_stale_trial_ids(study_id)  # Optuna's public function ends these trials

    def take_lease(self, trial_id: int) -> None:
        self.set_trial_user_attr(trial_id, FOLDER, self.place)
        self.record_heartbeat(trial_id)  # so that no other machine considers it dead

    def check_lease(self, trial_id: int) -> None:
        trial = self.get_trial(trial_id)
        if trial.user_attrs.get(FOLDER) != self.place or trial.state != TrialState.RUNNING:
            raise TakenOver("taken over by another process, because this process sent no heartbeats.")

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self.check_lease(trial_id)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    @contextlib.contextmanager
    def heartbeat(self, trial: Trial | FrozenTrial) -> Iterator[None]:
        is_over = Event()

        def record() -> None:
            pause = self.interval
            while not is_over.wait(pause):
                try:
                    self.check_lease(trial_id(trial))
                    self.record_heartbeat(trial_id(trial))
                    pause = self.interval
                except TakenOver:  # the heartbeats of the other process count
                    return
                except (SQLAlchemyError, StorageInternalError):
                    pause = 1

        Thread(target=record, daemon=True).start()
        try:
            yield
        finally:
            is_over.set()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            remedy = "Finished trials are kept. Run the command again."
            raise UserError(f"{self.address} no longer responds: {_reason(error)} {remedy}") from error


def connect(storage: str, folder: Path, study_name: str, interval: int) -> Database:
    """Connect to a database.

    Args:
        storage: the URL of the database.

    Raises:
        UserError: the URL is wrong, its driver is missing, or the database cannot be reached or used.
    """
    try:
        url = make_url(storage)
    except ArgumentError as error:  # its message is not shown, because it can contain a password
        example = "postgresql://user@host/database"
        raise UserError(f"hydra.sweeper.storage is not the URL of a database. Use one such as {example}.") from error
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"connect_timeout": "10", **url.query})
        url = url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
    try:
        try:
            return Database(url, folder, study_name, interval)
        except (ProgrammingError, IntegrityError):  # another process was creating the tables
            time.sleep(1)
            return Database(url, folder, study_name, interval)
    except (ImportError, SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        if name := cli.missing_package(error):
            package = {"psycopg": "'cifarnet[postgres]'", "MySQLdb": "mysqlclient"}.get(name, name)
            raise UserError(f"The database of hydra.sweeper.storage needs {name}: pip install {package}") from error
        raise UserError(
            f"{url.set(query={}).render_as_string()} cannot be used: {_reason(error)} Check hydra.sweeper.storage, "
            "and that the server accepts your login (the password is read from PGPASSWORD or ~/.pgpass)."
        ) from error


def refuse_password(storage: str) -> None:
    """Refuse a URL that contains a password, which `ps`, the shell's history and the sweep's record would show.

    Args:
        storage: the URL as written in the command, before `${oc.env:…}` is replaced.
    """
    if re.search(PASSWORD, re.sub(r"\$\{oc\.env:\w+\}", "", storage)):
        raise UserError(
            "hydra.sweeper.storage contains a password, which the sweep's record would keep. Set the password in "
            "PGPASSWORD or ~/.pgpass, or put the whole URL in an environment variable: "
            "'hydra.sweeper.storage=${oc.env:OPTUNA_STORAGE}'."
        )


def _unique_name(folder: Path) -> str:
    """Return a unique name for a folder on this machine. Copies of a machine can have the same name and paths."""
    token = folder / "place.txt"
    if not token.exists():
        files.write(token, secrets.token_hex(4))
    return f"{platform.node()}#{token.read_text()}:{folder.resolve()}"


def _reason(error: BaseException) -> str:
    """Return the message of the server or its driver."""
    while error.__cause__ is not None and not hasattr(error, "orig"):
        error = error.__cause__
    return " ".join(str(getattr(error, "orig", None) or error).split()).rstrip(".?") + "."
