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
from omegaconf import OmegaConf

from cifarnet.errors import UserError
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


# B. Writing elsewhere

CALLBACKS, LOGGERS = "lightning.pytorch.callbacks", "lightning.pytorch.loggers"
ELSEWHERE = [
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "dirpath": "{tmp}/exploded"}),
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "dirpath": "exploded"}),
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "dirpath": "~/exploded"}),
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "dirpath": "${output_dir}/../exploded"}),
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "dirpath": "${data.evil}"}),
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "filename": "../../exploded"}),
    ("callbacks", {"_target_": f"{CALLBACKS}.ModelCheckpoint", "filename": "{tmp}/exploded"}),
    (
        "callbacks",
        {"_target_": f"{CALLBACKS}.ModelCheckpoint", "filename": "{a}{a].__reduce_ex__.__globals__[os].name}"},
    ),
    ("callbacks", {"_target_": f"{CALLBACKS}.OnExceptionCheckpoint", "dirpath": "{tmp}", "filename": "exploded"}),
    (
        "callbacks",
        {"_target_": f"{CALLBACKS}.OnExceptionCheckpoint", "dirpath": "${output_dir}", "filename": "../exploded"},
    ),
    ("callbacks", {"_target_": f"{CALLBACKS}.SpikeDetection", "exclude_batches_path": "exploded"}),
    ("recipe", {"_target_": f"{CALLBACKS}.SpikeDetection", "exclude_batches_path": "{tmp}/exploded.json"}),
    (
        "callbacks",
        {"_target_": f"{CALLBACKS}.LambdaCallback", "on_fit_start": {"_target_": "torch.save", "f": "exploded"}},
    ),
    ("logger", {"_target_": f"{LOGGERS}.CSVLogger", "save_dir": "exploded"}),
    ("logger", {"_target_": f"{LOGGERS}.CSVLogger", "save_dir": "${output_dir}", "name": "../exploded"}),
    ("logger", {"_target_": f"{LOGGERS}.TensorBoardLogger", "save_dir": "${output_dir}", "version": "{tmp}/exploded"}),
    ("logger", {"_target_": f"{LOGGERS}.TensorBoardLogger", "save_dir": "${output_dir}", "sub_dir": "../../exploded"}),
    ("logger", {"_target_": f"{LOGGERS}.TensorBoardLogger", "save_dir": "local://{tmp}/exploded"}),
    ("logger", {"_target_": f"{LOGGERS}.MLFlowLogger", "tracking_uri": "sqlite:///exploded.db"}),
    ("logger", {"_target_": f"{LOGGERS}.MLFlowLogger", "tracking_uri": "file:{tmp}/exploded"}),
    ("trainer", {"_target_": "lightning.pytorch.profilers.SimpleProfiler", "dirpath": "exploded", "filename": "x"}),
    ("trainer", {"_target_": "lightning.pytorch.profilers.SimpleProfiler", "filename": "{tmp}/exploded"}),
    ("trainer", {"_target_": "lightning.pytorch.plugins.AsyncCheckpointIO", "checkpoint_io": {"x": "/exploded"}}),
]


@pytest.mark.parametrize(("section", "part"), ELSEWHERE, ids=lambda value: str(value)[-60:])
def test_a_recorded_component_writes_only_into_the_folder_of_the_run(run, tmp_path, section, part):
    part = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value for key, value in part.items()
    }
    name = "profiler" if section == "trainer" else "x"
    recorded(run, **{section: {name: part}, "data": {"evil": str(tmp_path / "exploded")}})
    with (
        watched(run),
        pytest.raises(UserError, match=r"last\.ckpt.*(outside the run's folder|names the class)") as error,
    ):
        go_on(run)
    assert not [path for path in tmp_path.rglob("*exploded*")]
    assert "\n" not in str(error.value)


def test_recorded_components_that_write_into_the_run_are_resumed(run):
    best = {
        "_target_": f"{CALLBACKS}.ModelCheckpoint",
        "dirpath": "${output_dir}/more",
        "filename": "{epoch}-{step}",
        "mode": "max",
    }
    log = {"_target_": f"{LOGGERS}.CSVLogger", "save_dir": "${output_dir}", "name": "csv", "version": ""}
    recorded(run, callbacks={"x": best}, logger={"x": log})
    with watched(run):
        go_on(run)
    assert (run / "csv/metrics.csv").is_file()
    assert [path.name for path in (run / "more").iterdir()] == ["epoch=1-step=4.ckpt"]


def test_a_path_that_the_command_repeats_is_used(run, tmp_path):
    recorded(run, logger={"x": {"_target_": f"{LOGGERS}.CSVLogger", "save_dir": "mine"}})
    go_on(run, "logger.x.save_dir=mine")
    assert (tmp_path / "mine").is_dir()


# C. Secrets

SECRETS = ["${oc.env:TOKEN}", r"\${oc.env:TOKEN}", r"\\${oc.env:TOKEN}", "${oc.decode:${oc.env:TOKEN}}", "x${now:%Y}"]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("key", ["name", "data.seed", "callbacks.pictures", "logger.x.name", "callbacks.x._target_"])
def test_a_recorded_text_is_not_replaced_with_a_value_of_the_environment(run, monkeypatch, capsys, text, key):
    monkeypatch.setenv("TOKEN", "my-secret")

    def change(content):
        part = content["hyper_parameters"]["config"]
        *sections, name = key.split(".")
        for section in sections:
            part[section] = part.get(section) or {}
            part = part[section]
        part[name] = text

    alter(run / "checkpoints/last.ckpt", change)
    with pytest.raises(UserError, match=r"environment|names the class") as error:
        resume(run)
    assert "my-secret" not in str(error.value) + "".join(capsys.readouterr())


def test_values_of_the_environment_are_recorded_except_those_of_loggers(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKEN", "my-${oc.env:HOME}-secret")
    monkeypatch.setenv("SHARE", "0.25")
    composed = config("logger=csv", "callbacks.pictures=null", "scheduler=constant", "trainer.max_epochs=1")
    OmegaConf.update(composed, "logger.csv.prefix", "${oc.env:TOKEN}", force_add=True)
    OmegaConf.update(composed, "data.val_fraction", "${oc.decode:${oc.env:SHARE}}")
    train(composed)
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    recorded_config = content["hyper_parameters"]["config"]
    assert recorded_config["logger"]["csv"]["prefix"] == "${oc.env:TOKEN}"
    assert recorded_config["data"]["val_fraction"] == 0.25
    metrics = (tmp_path / "run/metrics.json").read_text()
    assert "my-" not in metrics + str(content["hyper_parameters"]) + capsys.readouterr().out
    monkeypatch.delenv("SHARE")
    with pytest.raises(UserError, match=r"logger\.csv\.prefix=.* environment"):
        resume(tmp_path / "run")
    go_on(tmp_path / "run", "logger.csv.prefix=mine")


# H. Exhaustion


def bomb(content):
    config = content["hyper_parameters"]["config"]
    config["trainer"] |= {f"x{level}": f"${{trainer.x{level + 1}}}" * 9 for level in range(12)} | {"x12": "lol"}


def relative_bomb(content):
    config = content["hyper_parameters"]["config"]
    config["trainer"] |= {f"x{level}": f"${{.x{level + 1}}}" * 9 for level in range(12)} | {"x12": "lol"}


def tree_bomb(content):
    config = content["hyper_parameters"]["config"]
    for level in range(40):
        config["data"][f"x{level}"] = dict.fromkeys("ab", f"${{data.x{level + 1}}}")
    config["data"]["x40"] = "lol"


def long_bomb(content):
    content["hyper_parameters"]["config"]["data"] |= {"x": "y" * 10**6, "z": "${data.x}" * 10**4}


@pytest.mark.parametrize("change", [bomb, relative_bomb, tree_bomb, long_bomb])
def test_references_that_multiply_are_refused(run, change):
    alter(run / "checkpoints/last.ckpt", change)
    with pytest.raises(UserError, match="refer to each other too often"):
        resume(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.devices", 4096), ("trainer.devices", "4096"), ("trainer.devices", [0, 4096]), ("threads", 1024)],
)
def test_a_recorded_config_does_not_start_thousands_of_processes(run, key, value):
    def change(content):
        part = content["hyper_parameters"]["config"]
        *sections, name = key.split(".")
        for section in sections:
            part = part[section]
        part[name] = value

    alter(run / "checkpoints/last.ckpt", change)
    with pytest.raises(UserError, match=rf"{key}.*=\d+ exceeds the \d+ cores.*{key}"):
        resume(run)
    assert resume(run, [f"{key}=1"])[0].trainer.max_epochs == 1
