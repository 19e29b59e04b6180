"""Files of strangers: nothing in them runs, nothing is written outside the run's folder, nothing is fetched."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import small

WRITES = {"os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1, "os.truncate": 0}
FETCHES = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
OWN_PROGRAMS = ("git", "nvidia-smi")  # `system.hardware` runs them for the record
watching: list[list[tuple[str, str]]] = []  # the lists of the events that `watched` has seen


def _watch(event: str, arguments: tuple) -> None:
    if not watching:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            watching[-1].append(("write", os.path.abspath(os.fsdecode(path))))
    elif event in WRITES and isinstance(arguments[WRITES[event]], str | bytes | os.PathLike):
        watching[-1].append(("write", os.path.abspath(os.fsdecode(arguments[WRITES[event]]))))
    elif event == "subprocess.Popen" and os.path.basename(os.fsdecode(arguments[1][0])) not in OWN_PROGRAMS:
        watching[-1].append(("run", str(arguments[1])))
    elif event in ("os.system", "os.exec", "os.posix_spawn") or event in FETCHES:
        watching[-1].append(("run" if event.startswith("os.") else "fetch", str(arguments)))


sys.addaudithook(_watch)


@contextlib.contextmanager
def watched(*folders: Path) -> Iterator[None]:
    """Fail if a program is started, a connection is opened, or a file outside these folders is written or removed."""
    events: list[tuple[str, str]] = []
    watching.append(events)
    try:
        yield
    finally:
        watching.remove(events)
    allowed = [*map(str, folders), os.environ["CIFARNET_CACHE"], "/dev/null", "/proc/"]
    outside = [event for event in events if event[0] != "write" or not event[1].startswith(tuple(allowed))]
    assert not [event for event in outside if "__pycache__" not in event[1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    without_figures = ["callbacks.pictures=null", "callbacks.progress=null", "scheduler=constant"]
    train(small(f"output_dir={folder}", "trainer.max_epochs=1", "data.train_size=100", *without_figures))
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of a finished run, in an otherwise empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def alter(path: Path, change) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def recorded(run: Path, **sections: Any) -> None:
    """Add components to the recorded config of a run: recorded(run, callbacks={"x": {…}})."""

    def change(content):
        config = content["hyper_parameters"]["config"]
        for section, parts in sections.items():
            config[section] = {**(config.get(section) or {}), **parts}

    alter(run / "checkpoints/last.ckpt", change)


def go_on(path: Path, *overrides: str) -> None:
    train(*resume(path, ["trainer.max_epochs=2", *overrides]))


# A. Deletion

OUTSIDE = ["..", ".", "../..", "/etc/x", "a/../../b", "{tmp}/mine", "{tmp}/mine.ckpt", "~", "file:///etc/x", ""]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_in_the_states_of_callbacks_remove_nothing(run, tmp_path, path):
    path = path.format(tmp=tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("mine/thesis.txt", "mine.ckpt", "run/notes.txt", "run/notes.ckpt"):
        (tmp_path / name).write_text("mine")

    def change(content):
        for state in content["callbacks"].values():
            if "best_model_path" in state:
                state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"), path)
                state["best_k_models"] = {path: torch.tensor(-1.0)}  # any epoch is better, and replaces it

    alter(run / "checkpoints/last.ckpt", change)
    with watched(run):
        go_on(run)
    for name in ("mine/thesis.txt", "mine.ckpt", "run/notes.txt", "run/notes.ckpt"):
        assert (tmp_path / name).read_text() == "mine"
    assert (run / "checkpoints/best.ckpt").is_file()


def test_a_folder_named_checkpoints_does_not_make_its_parent_a_run(run, tmp_path):
    home = tmp_path / "home"
    (home / "checkpoints").mkdir(parents=True)
    (home / "thesis.txt").write_text("mine")
    path = shutil.copy(run / "checkpoints/last.ckpt", home / "checkpoints/x.ckpt")
    with watched(tmp_path / "lightning_logs"):
        go_on(path)
    assert sorted(file.name for file in home.rglob("*")) == ["checkpoints", "thesis.txt", "x.ckpt"]
