"""Searches with a database: SQLite, and with `-m postgres` a PostgreSQL server that the tests start."""

import contextlib
import itertools
import os
import platform
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.distributions import FloatDistribution
from optuna.study import Study, create_study, load_study
from optuna.trial import TrialState

from cifarnet import search
from cifarnet.callbacks.pruning import Prune
from cifarnet.errors import UserError
from cifarnet.records.tables import read_run
from cifarnet.sweeps import storage as storage_module
from conftest import ALLOW_SIGNAL, SMALL, assert_same_weights, signal_at

RATE = "optimizer.lr=tag(log,interval(0.001,0.1))"
LEAN = [*SMALL, "scheduler=constant", "callbacks.pictures=null", "~logger", "threads=1", RATE]
SHORT = [*LEAN, "trainer.max_epochs=1", "hydra.sweeper.study_name=shared", "hydra.sweeper.heartbeat=1"]
SPACE = {"optimizer.lr": FloatDistribution(0.001, 0.1, log=True)}
PASSWORD = "it's @ secret"


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'shared.db'}"


@pytest.fixture
def run(command, url):
    """Run a search in a folder, as on another machine."""

    def start(folder: str, trials: int, *more: str):
        own = [f"hydra.sweep.dir={folder}", f"hydra.sweeper.trials={trials}", f"hydra.sweeper.storage={url}"]
        return command(*SHORT, *own, *more, main=search.main)

    return start


def connect(url: str, folder: Path) -> storage_module.Database:
    """Connect as a machine with this folder."""
    folder.mkdir(exist_ok=True)
    return storage_module.connect(url, folder, "train/shared", 1)


def study(url: str, name: str = "train/shared") -> Study:
    return load_study(study_name=name, storage=url)


def states(url: str) -> list[str]:
    return [trial.state.name for trial in study(url).trials]


def test_machines_share_a_search_and_each_reports_all_trials(run, url, tmp_path):
    assert run("one", 1)[0] == 0
    status, printed, error = run("two", 2)
    assert status == 0, error
    assert "Trial 2 of 2" in printed
    assert "2 of 2 jobs done, 1 elsewhere" in printed
    assert "Run the missing jobs" not in printed
    assert sorted(path.name for path in (tmp_path / "two").glob("[0-9]")) == ["1"]
    assert f"{tmp_path}/one/0," in (tmp_path / "two/sweep.csv").read_text()
    assert (tmp_path / "two/history.png").exists()
    first, second = study(url).trials
    assert first.params != second.params
    assert first.value == read_run(tmp_path / "one/0").score


def test_a_dead_trial_of_another_machine_is_run_again_and_counts_once(run, url, tmp_path):
    stop = signal_at(0, 2, signal.SIGTERM)
    assert run("one", 1, stop)[0] == 143
    [before] = study(url).trials
    assert before.state == TrialState.RUNNING
    status, printed, _ = run("two", 1, stop)
    assert (status, "Trial 1 was interrupted" in printed, "last.ckpt" in printed) == (
        143,
        True,
        False,
    )
    # on its own machine, its lock shows at once that it is dead
    status, printed, error = run("two", 1, stop, "hydra.sweeper.heartbeat=1000")
    assert status == 0, error
    assert "Waiting" not in printed
    assert "Job 0 continues from two/0/checkpoints/last.ckpt" in printed
    [after] = study(url).trials
    assert (after.state, after.params) == (TrialState.COMPLETE, before.params)
    status, printed, _ = run("one", 1, stop)
    assert (status, "Trial 1 of" in printed, "1 of 1 jobs done, 1 elsewhere" in printed) == (0, False, True)


def test_a_trial_that_runs_on_another_machine_is_not_drawn_again(run, url, tmp_path):
    storage = connect(url, tmp_path / "elsewhere")
    trial = create_study(study_name="train/shared", storage=storage).ask(SPACE)
    storage.take_lease(trial._trial_id)
    with storage.heartbeat(trial):
        status, printed, error = run("one", 1)
    assert status == 0, error
    assert "Waiting for heartbeats" in printed
    assert "Trial 1" not in printed
    assert "0 of 1 jobs done, 1 running: " in printed
    assert "Run the missing jobs" not in printed
    assert states(url) == ["RUNNING"]


def test_machines_with_the_same_name_and_path_are_distinguished(run, url, tmp_path):
    assert run("one", 1, signal_at(0, 2, signal.SIGTERM))[0] == 143
    (tmp_path / "one").rename(tmp_path / "on the other")
    [trial] = study(url).trials
    storage = connect(url, tmp_path / "elsewhere")
    storage.place = trial.user_attrs["folder"]
    storage.take_lease(trial._trial_id)
    with storage.heartbeat(trial):
        status, printed, error = run("one", 1, signal_at(0, 2, signal.SIGTERM))
    assert (status, "goes on" in printed) == (0, False), error
    assert "Waiting for heartbeats" in printed
    assert states(url) == ["RUNNING"]
    name, _, path = trial.user_attrs["folder"].partition(":")
    assert (name.partition("#")[0], path) == (platform.node(), str(tmp_path / "one"))


def test_two_machines_that_draw_the_last_trial_do_not_run_too_many(run, url, monkeypatch):
    ask = Study.ask

    def beside_another(self, *arguments):
        monkeypatch.setattr(Study, "ask", ask)
        other = study(url)
        other.tell(other.ask(SPACE), 0.5)
        return self.ask(*arguments)

    monkeypatch.setattr(Study, "ask", beside_another)
    status, printed, error = run("one", 1)
    assert status == 0, error
    assert "1 of 1 jobs done, 1 elsewhere" in printed
    assert states(url) == ["COMPLETE", "WAITING"]
    status, printed, error = run("one", 2)  # the enqueued trial is run when more are allowed
    assert status == 0, error
    assert "Trial 2 of 2" in printed
    assert states(url) == ["COMPLETE", "COMPLETE"]


def test_a_trial_whose_process_died_before_it_had_settings_is_continued(run, url, tmp_path):
    storage = connect(url, tmp_path / "elsewhere")
    create_study(study_name="train/shared", storage=storage, direction="maximize").ask()
    storage.record_heartbeat(1)
    status, printed, error = run("one", 1)
    assert status == 0, error
    assert "1 of 1 jobs done" in printed
    assert states(url) == ["COMPLETE"]


def test_a_trial_that_another_machine_finished_keeps_its_score(run, url, monkeypatch):
    tell = Study.tell

    def late(self, trial, *arguments, **more):
        monkeypatch.setattr(Study, "tell", tell)
        study(url).tell(trial.number, 0.99)
        self.tell(trial, *arguments, **more)

    monkeypatch.setattr(Study, "tell", late)
    status, _, error = run("one", 1)
    assert status == 0, error
    assert study(url).trials[0].value == 0.99


@pytest.mark.parametrize(
    ("storage", "named"),
    [
        ("postgresql://me:secret@127.0.0.1/db", "hydra.sweeper.storage contains a password"),
        ("postgresql://me@127.0.0.1/db?password=secret", "hydra.sweeper.storage contains a password"),
        ("mysql+pymysql://127.0.0.1/db?passwd=secret", "hydra.sweeper.storage contains a password"),
        ("postgresql://me:secret@${oc.env:HOME}/db", "hydra.sweeper.storage contains a password"),
        ("${oc.env:NONE,'postgresql://me:secret@127.0.0.1/db'}", "hydra.sweeper.storage contains a password"),
        ("postgresql://me@127.0.0.1:1/db", "postgresql+psycopg://me@127.0.0.1:1/db cannot be used: connection failed"),
        ("mysql+pymysql://127.0.0.1/db", "needs pymysql: pip install pymysql"),
        ("mysql://127.0.0.1/db", "needs MySQLdb: pip install mysqlclient"),
        ("sqlite:////nowhere/at/all.db", "cannot be used: unable to open database file."),
        ("redis://127.0.0.1", "redis://127.0.0.1 cannot be used: Can't load plugin"),
        ("group", "hydra.sweeper.storage is not the URL of a database"),
        ("''", "hydra.sweeper.storage is not the URL of a database"),
        ("3", "hydra.sweeper.storage=3 is not valid"),
        ("${oc.env:NONE}", "Environment variable 'NONE' not found"),
    ],
)
def test_a_database_that_cannot_be_used_is_reported_in_one_line(command, tmp_path, storage, named):
    quoted = storage if storage[0] in "$'3" else f"'{storage}'"
    status, printed, error = command(*SHORT, f"hydra.sweeper.storage={quoted}", main=search.main)
    assert (status, printed) == (1, "")
    assert named in error
    assert len(error.splitlines()) == 1
    assert "secret" not in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_a_missing_driver_is_named(command, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    status, _, error = command(*SHORT, "hydra.sweeper.storage=postgresql://127.0.0.1/db", main=search.main)
    assert status == 1
    assert error.endswith("needs psycopg: pip install 'cifarnet[postgres]'\n")


@pytest.mark.parametrize("beats", ["0", "1.5"])
def test_a_heartbeat_is_a_number_of_seconds(command, beats):
    status, _, error = command(*LEAN, f"hydra.sweeper.heartbeat={beats}", main=search.main)
    assert (status, f"hydra.sweeper.heartbeat={beats}" in error) == (1, True)


def test_a_url_in_a_variable_is_not_written_to_any_file(command, url, tmp_path, monkeypatch):
    monkeypatch.setenv("GROUPS_STUDIES", url)
    arguments = ["hydra.sweeper.storage=${oc.env:GROUPS_STUDIES}", "hydra.sweep.dir=one", "hydra.sweeper.trials=1"]
    stop = signal_at(0, 2, signal.SIGTERM)
    status, printed, error = command(*SHORT, stop, *arguments, main=search.main)
    assert status == 143
    records = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "shared.db"]
    assert {"multirun.yaml", "hydra.yaml", "last.ckpt"} <= {path.name for path in records}
    assert not [path for path in records if url.encode() in path.read_bytes()]
    assert url not in printed + error


def test_a_resumed_search_uses_its_database(run, command, url):
    assert run("one", 1, signal_at(0, 2, signal.SIGTERM))[0] == 143
    status, printed, error = command("sweep.resume=one", ALLOW_SIGNAL)
    assert status == 0, error
    assert "Trial 1 was interrupted and will be continued" in printed
    assert "1 of 1 jobs done" in printed
    status, _, error = command("sweep.resume=one", "seed=1")
    assert (status, "Remove seed=1" in error) == (1, True)


@pytest.mark.parametrize("storage_first", [True, False])
def test_a_folder_with_trials_of_another_study_is_refused(run, command, storage_first):
    """The same search in the same folder, with a database and without."""
    own = "hydra.sweeper.storage=null"
    assert run("one", 1, *([] if storage_first else [own]))[0] == 0
    status, printed, error = run("one", 2, *([own] if storage_first else []))
    assert (status, printed) == (1, "")
    assert error.startswith("Error: one/0 is not a trial of the study ")
    assert run("two", 1, *([own] if storage_first else []))[0] == 0


def test_a_lost_connection_is_restored(url, tmp_path, monkeypatch, capsys):
    storage = connect(url, tmp_path)
    dialect, slept = storage.engine.dialect, []
    reconnect, failures = dialect.connect, [dialect.loaded_dbapi.OperationalError("starting up")] * 3

    def unreachable(*arguments, **settings):
        if failures:
            raise failures.pop()
        return reconnect(*arguments, **settings)

    monkeypatch.setattr(dialect, "connect", unreachable)
    monkeypatch.setattr(storage_module.time, "sleep", slept.append)
    storage.engine.dispose()
    create_study(storage=storage).ask()
    assert slept == [1, 1, 1]
    assert capsys.readouterr().out.count("starting up. Trying again for 300 s") == 1


def test_each_outage_is_waited_for(url, tmp_path, monkeypatch):
    storage, slept, left = connect(url, tmp_path), [], 0
    dialect = storage.engine.dialect
    reconnect = dialect.connect

    def unreachable(*arguments, **settings):
        nonlocal left
        left -= 1
        if left >= 0:
            raise dialect.loaded_dbapi.OperationalError("starting up")
        return reconnect(*arguments, **settings)

    def waited(outage: int) -> int | None:
        """The seconds until there is a connection; None if there is none in time."""
        nonlocal left
        left = outage
        slept.clear()
        storage.engine.dispose()
        with contextlib.suppress(storage_module.SQLAlchemyError), storage.engine.connect():
            return len(slept)

    monkeypatch.setattr(dialect, "connect", unreachable)
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=slept.append)
    monkeypatch.setattr(storage_module, "time", clock)
    assert (waited(1000), len(slept)) == (None, storage_module.PATIENCE - 1)
    assert (waited(1000), len(slept)) == (None, 0)  # it is still down: ending the search does not wait again
    assert (waited(0), waited(3)) == (0, 3)
    with ThreadPoolExecutor(1) as heartbeat:
        assert heartbeat.submit(waited, 1000).result() is None
    assert waited(3) == 3


def test_a_lost_database_ends_the_search_with_one_line(run, url, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise storage_module.SQLAlchemyError("it is gone")

    monkeypatch.setattr(Study, "tell", lost)
    status, _, error = run("one", 1)
    assert status == 1
    assert error.splitlines()[-1].endswith(
        "no longer responds: it is gone. Finished trials are kept. Run the command again."
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    status, printed, error = run("one", 1)
    assert status == 0, error
    assert "Job 0 is done" in printed
    assert states(url) == ["COMPLETE"]


def suspend(process: subprocess.Popen, database: Path) -> None:
    """Suspend a process, but not while it writes a heartbeat, when it would lock the whole file."""
    while True:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        free = contextlib.closing(sqlite3.connect(database, timeout=0))
        with contextlib.suppress(sqlite3.OperationalError), free as connection:
            connection.execute("BEGIN IMMEDIATE")
            return
        process.send_signal(signal.SIGCONT)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot suspend a process with a signal")
@pytest.mark.parametrize("moment", ["training", "recording"])
def test_a_suspended_process_loses_its_trial(run, url, tmp_path, monkeypatch, moment):
    """It wakes while the other process trains, and records nothing; the other process finishes the trial."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from optuna.storages import RDBStorage\n"
        "from cifarnet.sweeps.trials import Trials\n"
        "def wait(original):\n"
        "    def late(*arguments):\n"
        "        Path('waits').touch()\n"
        "        while not Path('awake').exists(): time.sleep(0.02)\n"
        "        return original(*arguments)\n"
        "    return late\n"
        "if sys.argv.pop(1) == 'recording': Trials.tell = wait(Trials.tell)\n"
        "else:\n"
        "    from cifarnet.callbacks.pruning import Prune\n"
        "    Prune.on_validation_end = wait(Prune.on_validation_end)\n"
        "from cifarnet.search import main; main()"
    )
    settings = [*SHORT, "hydra.sweep.dir=one", "hydra.sweeper.trials=1", f"hydra.sweeper.storage={url}"]
    suspended = subprocess.Popen(
        [sys.executable, "-c", program, moment, *settings],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for((tmp_path / "waits").exists)
    suspend(suspended, tmp_path / "shared.db")
    time.sleep(3.1)  # longer than two heartbeats

    def wake(*_):
        (tmp_path / "awake").touch()
        suspended.send_signal(signal.SIGCONT)
        output.append(suspended.communicate(timeout=60)[0])

    output: list[str] = []
    monkeypatch.setattr(Prune, "on_train_start", wake, raising=False)
    status, printed, error = run("two", 1)
    assert status == 0, error
    assert "Trial 1 was interrupted and will be continued" in printed
    assert "1 of 1 jobs done: " in printed
    [trial] = study(url).trials
    assert (trial.state.name, trial.value) == ("COMPLETE", read_run(tmp_path / "two/0").score)
    assert suspended.returncode == 0, output
    assert "Trial 1: taken over by another process" in output[0]


# With a PostgreSQL


class Server:
    """A PostgreSQL server in its own folder, which root can start, too; its user has a password."""

    def __init__(self, folder: Path) -> None:
        found = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
        if not any(found):
            pytest.skip("no PostgreSQL: apt-get install postgresql")
        self.folder, self.programs = folder, Path(next(filter(None, found))).resolve().parent
        self.user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        if self.user:
            shutil.chown(folder, "nobody", "nogroup")
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        self.call("initdb", "--username=me", "--auth=scram-sha-256", f"--pwfile={folder}/password", "--no-sync")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def call(self, name: str, *arguments: str) -> None:
        command = [self.programs / name, f"--pgdata={self.folder}/data", *arguments]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, **self.user)
        assert result.returncode == 0, result.stdout + result.stderr

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self.call("pg_ctl", "start", "--wait", f"--log={self.folder}/log", f"--options={options}")

    def stop(self) -> None:
        self.call("pg_ctl", "stop", "--mode=immediate")

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://me@127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="postgres") as name:  # pytest's own folders are closed to other users
        server = Server(Path(name))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def empty(server, monkeypatch, tmp_path) -> str:
    """The URL of a new database."""
    import psycopg

    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    name = f"db{abs(hash(tmp_path))}"
    with psycopg.connect(server.url().replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url(name)


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "cifarnet.search", *LEAN, "hydra.sweeper.study_name=s", *arguments]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


LONG = ["data.train_size=600", "trainer.max_epochs=100", "callbacks.progress=null"]


@pytest.mark.postgres
@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "a folder each"])
def test_one_of_two_processes_is_killed(empty, server, tmp_path, shared):
    storage = [f"hydra.sweeper.storage={empty}", "hydra.sweeper.heartbeat=1", "hydra.sweeper.trials=2"]
    one, other, alone = tmp_path / "one", tmp_path / ("one" if shared else "other"), tmp_path / "alone"
    for folder in {one, other, alone}:
        folder.mkdir()
    runs = [folder / "lightning_logs/train/s" for folder in (one, other, alone)]
    killed = start(one, *LONG, *storage)
    wait_for((runs[0] / "0.lock").exists)
    left = start(other, *LONG, *storage)
    wait_for(lambda: (runs[0] / "0/checkpoints/last.ckpt").exists() and (runs[1] / "1/.hydra").exists())
    assert killed.poll() is None
    killed.kill()
    killed.communicate()
    assert [trial.state.name for trial in study(empty, "train/s").trials] == ["RUNNING", "RUNNING"]

    printed, _ = left.communicate()
    assert left.returncode == 0, printed
    assert "Trial 1 was interrupted and will be continued" in printed
    assert ("Job 0 continues from" in printed) == shared
    assert "2 of 2 jobs done" in printed
    assert "already reported" not in printed
    server.stop()
    server.start()
    held = study(empty, "train/s").trials
    assert [trial.state.name for trial in held] == ["COMPLETE", "COMPLETE"]

    reference = start(alone, *LONG, "hydra.sweeper.trials=1")
    assert reference.wait() == 0
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_weights(runs[1] / "0/checkpoints" / name, runs[2] / "0/checkpoints" / name)
    values = load_values(runs[2])
    assert (held[0].value, held[0].intermediate_values) == values
    first, second = (read_run(folder / "0").numbers["test_accuracy"] for folder in (runs[1], runs[2]))
    assert first == second


def load_values(folder: Path) -> tuple[float, dict[int, float]]:
    """The score of the first trial in a journal, and its accuracies by epoch."""
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    journal = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    trial = load_study(study_name=folder.name, storage=journal).trials[0]
    return trial.value, trial.intermediate_values


@pytest.mark.postgres
def test_a_restart_of_the_server_does_not_end_a_search(empty, server, tmp_path):
    process = start(tmp_path, *LONG, f"hydra.sweeper.storage={empty}", "hydra.sweeper.trials=1")
    wait_for((tmp_path / "lightning_logs/train/s/0/checkpoints/last.ckpt").exists)
    server.stop()
    time.sleep(3)
    server.start()
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "Trying again for 300 s" in printed
    [trial] = study(empty, "train/s").trials
    assert (trial.state.name, len(trial.intermediate_values)) == ("COMPLETE", 100)


@pytest.mark.postgres
def test_processes_that_start_together_create_the_tables_once(empty, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda number: connect(empty, tmp_path / str(number)), range(8)))
    assert len({storage.get_current_version() for storage in opened}) == 1


@pytest.mark.postgres
def test_a_wrong_password_is_reported_but_not_shown(empty, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "wrong one")
    with pytest.raises(UserError, match=r"password authentication failed.*PGPASSWORD or ~/.pgpass") as raised:
        connect(empty, tmp_path)
    assert "wrong one" not in str(raised.value)
