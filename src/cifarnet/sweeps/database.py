"""A search's study in a database: which processes of other machines are at work on a trial, and which have died.

Optuna keeps a heartbeat for each trial. To beat and to listen is left to `Study.optimize`, which cannot go on with a
trial: it fails what has died, and begins another. So both are done here.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from datetime import datetime
from threading import Event, Thread, current_thread, main_thread
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel as Heartbeat
from sqlalchemy import event, func, make_url, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from cifarnet.errors import UserError, printable

PATIENCE = 300  # seconds, for a database that is being started again
PASSWORD = r"^[^/]*://[^/@:]*:[^@]+@|[?&]\w*passw(or)?d="


class Database(RDBStorage):
    """Optuna's storage, which makes a lost connection again.

    Args:
        url: as SQLAlchemy understands it.
        pulse: seconds between the heartbeats of a trial; one not heard of for twice as long is dead.
    """

    def __init__(self, url: URL, pulse: int) -> None:
        self.place, self.pulse, self.patience = url.set(query={}).render_as_string(), pulse, PATIENCE
        super().__init__(url.render_as_string(hide_password=False), {"pool_pre_ping": True})
        event.listen(self.engine, "do_connect", self._connect)  # from now on: the first connection is not waited for

    def _connect(self, dialect: Any, record: Any, arguments: tuple, settings: dict[str, Any]) -> Any:
        end, told = time.monotonic() + self.patience, False
        while True:
            try:
                connection = dialect.connect(*arguments, **settings)
                self.patience = PATIENCE
                return connection
            except dialect.loaded_dbapi.OperationalError as error:
                if time.monotonic() >= end:
                    if current_thread() is main_thread():  # the search ends, and waits no more until it is back
                        self.patience = 0
                    raise
                if not told:
                    print(printable(f"{self.place}: {_reason(error)} Tried again for {PATIENCE} seconds"), flush=True)
                told = True
                time.sleep(1)

    def heard(self, trial_id: int) -> tuple[datetime, bool]:
        """When a running trial's process gave its last sign of life, and whether it is dead."""
        query = select(Heartbeat.heartbeat, func.now()).where(Heartbeat.trial_id == trial_id)
        with self.engine.connect() as connection:
            found = connection.execute(query).first()
        if found is None:  # it has just begun, or died before its first: then this is the first
            self.record_heartbeat(trial_id)
            return self.heard(trial_id)
        beat, now = found
        return beat, (now.replace(tzinfo=None) - beat).total_seconds() > 2 * self.pulse

    def take_over(self, trial_id: int, since: datetime) -> bool:
        """Beat in a dead process's stead, if nobody has since then: of all that try, one does."""
        query = update(Heartbeat).where(Heartbeat.trial_id == trial_id, Heartbeat.heartbeat <= since)
        with self.engine.begin() as connection:
            return connection.execute(query.values(heartbeat=func.now())).rowcount == 1

    @contextlib.contextmanager
    def beating(self, trial_id: int) -> Iterator[None]:
        """Others hear of the trial for as long as this process lives, and the database does."""
        over = Event()

        def beat() -> None:
            while not over.wait(self.pulse):
                with contextlib.suppress(SQLAlchemyError, StorageInternalError):
                    self.record_heartbeat(trial_id)

        Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """For what a lost connection raises."""
        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            raise UserError(
                f"{self.place} no longer answers: {_reason(error)} What was trained is kept: give the command again."
            ) from error


def connect(storage: str, pulse: int) -> Database:
    """The database of that URL.

    Raises:
        UserError: it is no URL, its driver is missing, or the database cannot be reached or used.
    """
    try:
        url = make_url(storage)
    except ArgumentError as error:  # not shown: it may hold a password
        raise UserError(
            "hydra.sweeper.storage is no database's URL. Give one such as postgresql://user@host/database."
        ) from error
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"connect_timeout": "10", **url.query})
        url = url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
    place = url.set(query={}).render_as_string()
    try:
        try:
            return Database(url, pulse)
        except (ProgrammingError, IntegrityError):  # another process was making the tables
            time.sleep(1)
            return Database(url, pulse)
    except ImportError as error:
        name = getattr(error.__cause__, "name", None)
        package = "'cifarnet[postgres]'" if url.drivername == "postgresql+psycopg" else name
        raise UserError(f"{place} needs {name}: pip install {package}") from error
    except NoSuchModuleError as error:
        raise UserError(f"hydra.sweeper.storage={place}: there is no such kind of database.") from error
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:  # the last for tables of another Optuna
        raise UserError(
            f"{place} cannot be used: {_reason(error)} Check hydra.sweeper.storage, and that the server lets you in "
            "(a password is taken from PGPASSWORD or ~/.pgpass)."
        ) from error


def refuse_password(written: str) -> None:
    """In a command, where `ps`, the shell's history and the run's records would show it."""
    if re.search(PASSWORD, re.sub(r"\$\{oc\.env:\w+\}", "", written)):
        raise UserError(
            "hydra.sweeper.storage: leave out the password, which the run's records would keep. Give it in PGPASSWORD "
            "or ~/.pgpass, or the whole URL in a variable: 'hydra.sweeper.storage=${oc.env:OPTUNA_STORAGE}'."
        )


def _reason(error: BaseException) -> str:
    """What the server or its driver says."""
    while error.__cause__ is not None and not hasattr(error, "orig"):
        error = error.__cause__
    return " ".join(str(getattr(error, "orig", None) or error).split()).rstrip(".?") + "."
