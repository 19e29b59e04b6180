"""Files of strangers: nothing in them runs, nothing is written outside the run's folder, nothing is fetched."""

import contextlib
import csv
import json
import logging
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cifarnet.checkpoint import Checkpoint
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate
from cifarnet.export import export
from cifarnet.inference.trained import load
from cifarnet.predict import predict
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import alter, picture, small

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
        folder = os.readlink(f"/proc/self/fd/{arguments[-1]}") if event != "os.truncate" and arguments[-1] >= 0 else ""
        watching[-1].append(("write", os.path.abspath(os.path.join(folder, os.fsdecode(arguments[WRITES[event]])))))
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
        "dirpath": "${output_dir}/checkpoints/more",
        "filename": "{epoch}-{step}",
        "mode": "max",
    }
    log = {"_target_": f"{LOGGERS}.CSVLogger", "save_dir": "${output_dir}", "name": "csv", "version": ""}
    recorded(run, callbacks={"x": best}, logger={"x": log})
    with watched(run):
        go_on(run)
    assert (run / "csv/metrics.csv").is_file()
    assert [path.name for path in (run / "checkpoints/more").iterdir()] == ["epoch=1-step=4.ckpt"]


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
    with pytest.raises(UserError, match=rf"{key}.*=\d+ exceeds \d+.*{key}"):
        resume(run)
    assert resume(run, [f"{key}=1"])[0].trainer.max_epochs == 1


# I. Formulas and escapes


def test_names_in_a_file_run_nothing_in_a_spreadsheet_or_a_terminal(run, tmp_path, capsys):
    names = ["=cmd|' /C calc'!A0", "@SUM(1)", "\x1b]0;owned\x07", "<script>alert(1)</script>", "-1", "{{ 7*7 }}"]
    names += ["$\\frac{$", "`id`", "| a", "${oc.env:HOME}"]
    path = alter(run / "checkpoints/best.ckpt", lambda content: content["hyper_parameters"].update(class_names=names))
    for name in ("=1+1.png", "-x.png", "\x1b[2J.png"):
        picture(tmp_path / "pictures" / name)
    os.mkdir("out")
    with watched(tmp_path / "out"):
        predict(path, ["pictures"], ["output=out/predictions.csv"])
    with open("out/predictions.csv", encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    assert len(rows) == 3
    for row in rows:
        assert not [cell for cell in row if cell[:1] in tuple("=+-@\t\r")]
    with watched(tmp_path / "nowhere"):
        predict(path, ["pictures"])
    assert "\x1b" not in "".join(capsys.readouterr())


def test_the_log_of_a_run_has_no_escapes(run, caplog, capsys):
    def change(content):
        for state in content["callbacks"].values():
            for session in state.get("sessions", []):
                session["precision"] = "\x1b]0;owned\x07"

    alter(run / "checkpoints/last.ckpt", change)
    with caplog.at_level(logging.INFO, "cifarnet"):
        go_on(run)
    assert r"precision was \x1b]0;owned\x07" in caplog.text
    assert "\x1b]" not in caplog.text + "".join(capsys.readouterr())


def test_a_page_with_names_of_a_stranger_has_no_scripts(run, tmp_path):
    names = sorted(["<script>alert(1)", "{{ 7*7 }}", "<img src=x onerror=alert(1)>", *"abcdefg"])
    path = alter(run / "checkpoints/best.ckpt", lambda content: content["hyper_parameters"].update(class_names=names))
    for split in ("train", "test"):
        for number, name in enumerate(names):
            for copy in range(2):
                picture(tmp_path / "pictures" / split / name / f"{copy}.png", (number, copy, 0))
    (tmp_path / "out").mkdir()
    with watched(tmp_path / "out"):
        evaluate(
            path, ["data=folder", "data.root=pictures", "data.val_fraction=0.5", "output_dir=out", "corruptions=false"]
        )
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert ">49<" not in page
    assert "&lt;script&gt;alert" in page


# New kinds


class Runs:
    """A pickle that runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PICKLES = [
    Runs(os.system, "touch exploded"),
    Runs(os.mkdir, "exploded"),
    Runs(eval, "open('exploded', 'w')"),
    Runs(torch.load, "exploded"),
    Runs(torch.hub.load_state_dict_from_url, "http://127.0.0.1/exploded"),
    Runs(torch.nn.Linear, 1, 1),
    Runs(getattr, torch.Tensor, "numpy"),
    Runs(type, "Evil", (), {}),
]
PLACES = ["optimizer_states", "callbacks", "loops", "lr_schedulers", "hyper_parameters", "state_dict", "extra"]


@pytest.mark.parametrize("payload", PICKLES, ids=lambda payload: payload.call[0].__name__)
def test_a_pickle_in_any_part_of_a_checkpoint_is_refused(run, payload):
    path = run / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    for place in PLACES:
        torch.save(content | {place: {"x": [payload]}}, path)
        for use in (Checkpoint.open, resume, load):
            with watched(), pytest.raises(UserError, match="is not a readable cifarnet checkpoint"):
                use(path)


def test_an_archive_with_the_names_of_other_files_extracts_nothing(run, tmp_path):
    path = run / "checkpoints/best.ckpt"
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../exploded", "/tmp/exploded", "best/../../exploded", "best/code/exploded.py", "C:\\exploded"):
            archive.writestr(name, "print('exploded')")
    with watched(), contextlib.suppress(UserError):
        load(path)
    assert not list(tmp_path.rglob("exploded*"))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    output = f"output={tmp_path_factory.mktemp('exported')}/hub"
    return export(trained, ["format=hub", output, "data=synthetic", "data.test_size=10", "images=2"])


@pytest.fixture
def hub(exported, tmp_path, monkeypatch):
    """A copy of a folder in Hugging Face's format, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(exported, tmp_path / "hub"))


def test_a_header_of_safetensors_that_claims_other_places_is_refused(hub):
    good = (hub / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    for change in (
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [-8, 0]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"dtype": "O"},
    ):
        text = json.dumps(header | {first: header[first] | change}).encode()
        (hub / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
        with watched(), pytest.raises(UserError, match="is not a readable cifarnet checkpoint"):
            load(hub)
    for length in (2**63, 10**9, 0):
        (hub / "model.safetensors").write_bytes(struct.pack("<Q", length) + good[8:])
        with watched(), pytest.raises(UserError, match="is not a readable cifarnet checkpoint"):
            load(hub)


def test_more_files_in_a_folder_of_the_hub_are_not_used(hub, tmp_path, monkeypatch):
    for name in ("modeling.py", "psutil.py", "conftest.py", "sitecustomize.py", "__init__.py", "cifarnet.py"):
        (hub / name).write_text("open('exploded', 'w')")
    (hub / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(os.mkdir, "exploded")))
    settings = json.loads((hub / "config.json").read_text())
    settings |= {"auto_map": {"AutoModel": "modeling.Model"}, "trust_remote_code": True, "_target_": "os.mkdir"}
    settings["model"] |= {"_partial_": True, "_convert_": "all"}
    (hub / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(hub)
    with watched():
        assert len(load(".").class_names) == 10
    assert not list(tmp_path.rglob("exploded"))


def test_large_numbers_in_the_settings_of_a_hub_folder_are_refused(hub):
    text = (hub / "config.json").read_text()
    for old, new in [('"epoch": 1', '"epoch": 1' + "0" * 5000), ('"image_size": 32', '"image_size": 1e308')]:
        assert old in text
        (hub / "config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match="hub"):
            load(hub)
    (hub / "config.json").write_text('{"model": ' + "[" * 10**5)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load(hub)


def test_links_in_the_folder_of_a_run_lead_nowhere(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    names = ("metrics.json", "report.html", "confusion.png", "reliability.png")
    (run / "evaluation").mkdir()
    for name in names:
        (run / "evaluation" / name).symlink_to(tmp_path / "mine/thesis.txt")
    with watched(run / "evaluation"):
        evaluate(run, ["corruptions=false"])
    for name in ("exported", "explained"):
        (run / name).symlink_to(tmp_path / "mine")
        with watched(), pytest.raises(UserError, match="is a link to a place outside"):
            Checkpoint.open(run).folder_for(name)
        (run / name).unlink()
    (run / "train.log").symlink_to(tmp_path / "mine/thesis.txt")
    with watched(), pytest.raises(UserError, match="is a link to a place outside"):
        resume(run)
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_checkpoint_that_is_replaced_after_it_was_verified_is_not_read_again(run):
    """Between the check and the use, another process may replace the file."""
    config, checkpoint = resume(run, ["trainer.max_epochs=2"])
    checkpoint.path.unlink()
    torch.save({"callbacks": Runs(os.mkdir, "exploded")}, run / "other.ckpt")
    os.replace(run / "other.ckpt", checkpoint.path)
    with watched(run):
        train(config, checkpoint)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "where", ["model", "data", "module", "objective", "scheduler", "trainer.plugins", "recipe.x.y"]
)
def test_a_class_anywhere_in_a_recorded_config_is_refused(run, where):
    targets = ["torch.hub.load", "torch.utils.collect_env.run", "torch.load", "builtins.exec", "hydra.utils.call"]
    for target in targets:

        def change(content, target=target):
            part = content["hyper_parameters"]["config"]
            *sections, name = where.split(".")
            for section in sections:
                part[section] = part.get(section) or {}
                part = part[section]
            part[name] = [{"x": ({"_target_": target, "_args_": ["exploded"]},)}]

        alter(run / "checkpoints/last.ckpt", change)
        with watched(), pytest.raises(UserError, match=rf"names the class {target}"):
            resume(run)


@pytest.mark.parametrize("name", ["pipe", "zero", "large", "deep", "huge"])
def test_records_that_never_end_are_refused(run, name):
    metrics = run / "metrics.json"
    text = metrics.read_text()
    metrics.unlink()
    if name == "pipe":
        os.mkfifo(metrics)
    elif name == "zero":
        metrics.symlink_to("/dev/zero")
    elif name == "large":
        with metrics.open("wb") as file:
            file.truncate(2**26 + 1)
    else:
        value = "[" * 10**5 if name == "deep" else "1" + "0" * 4000
        metrics.write_text(text.replace('"epochs": 1', f'"epochs": {value}'))
    with pytest.raises(UserError, match=r"metrics\.json"):
        load(run).run_record()


# D. Network


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/cifar.tar.gz", "file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_recorded_data_settings_fetch_nothing(run, tmp_path, monkeypatch, url):
    monkeypatch.setenv("CIFARNET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    data = {"_target_": "cifarnet.data.CIFAR10", "root": str(tmp_path / "mine"), "url": url}

    def change(content):
        content["hyper_parameters"]["data"] = data
        content["hyper_parameters"]["config"]["data"] = data | {"read_only": False, "workers": 2}

    for name in ("best", "last"):
        alter(run / f"checkpoints/{name}.ckpt", change)
    with watched(run, tmp_path / "cache"):
        for use in (lambda: go_on(run), lambda: evaluate(run, ["corruptions=false"])):
            with pytest.raises(UserError):
                use()
        export(run, ["format=hub"])  # compares on random pixels
    assert os.listdir(tmp_path / "mine") == []


def test_networks_of_libraries_fetch_no_weights(run):
    nets = {
        "a": {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT", "num_classes": 10},
        "b": [{"_target_": "timm.models.resnet.resnet10t", "pretrained": True}],
        "c": {"_target_": "torch.nn.CrossEntropyLoss", "weights": [1.0]},
    }
    recorded(run, objective=nets)
    config, _ = resume(run)
    with watched():
        assert instantiate(config.objective.a).fc.out_features == 10
        assert instantiate(config.objective.b[0]).num_classes == 1000
    assert config.objective.c.weights == [1.0]
