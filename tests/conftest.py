import hashlib
import io
import logging
import os
import pickle
import shutil
import signal
import stat
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn

from cifarnet.cli import compose
from cifarnet.errors import Interrupted
from cifarnet.models import Normalize
from cifarnet.records.record import Record
from cifarnet.resuming import resume
from cifarnet.train import main, train

if "PYTEST_XDIST_WORKER" in os.environ:  # of several workers, each uses one core
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores the signal

SMALL = [
    "data=synthetic",
    "data.train_size=200",
    "data.test_size=50",
    "data.batch_size=32",
    "model.widths=[4,4,8,8]",
    "model.hidden=16",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.precision=32-true",
]

LEARNS = [  # learns something within seconds
    *("data=synthetic", "data.train_size=300", "data.test_size=60", "data.batch_size=50", "trainer.max_epochs=1"),
    *("model=speednet", "model.widths=[8,8,8]", "optimizer=muon", "optimizer.lr=0.1", "scheduler=linear"),
    *("trainer=cpu", "trainer.precision=32-true", "threads=1", "module.tta=mirror", "module.tta_share=0.3"),
]

IMAGES_A_FILE = 20
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class SignalAt(Callback):
    """Sends this process a signal after a batch of an epoch (both count from 0), when the next batch has begun."""

    def __init__(self, epoch: int, batch: int, number: int) -> None:
        self.moment, self.number = (epoch, batch), number

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx - 1) == self.moment:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_last_batch and (trainer.current_epoch, batch_idx) == self.moment:
            os.kill(os.getpid(), self.number)


class CustomNetwork(nn.Module):
    """A network from outside the project."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Normalize(), nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    def forward(self, images):
        return self.layers(images)


def signal_at(epoch: int, batch: int, number: int) -> str:
    """Return the override that adds `SignalAt` to a run."""
    return f"+callbacks.signal={{_target_: conftest.SignalAt, epoch: {epoch}, batch: {batch}, number: {int(number)}}}"


ALLOW_SIGNAL = "classes=[conftest.SignalAt]"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_close_weights(first: Path, second: Path) -> None:
    """Compare the last checkpoints of two runs, except for rounding."""
    one, other = (weights(folder / "checkpoints/last.ckpt") for folder in (first, second))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Use an empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CIFARNET_CACHE", str(folder))
    return folder


def small(*overrides: str, without: str | tuple[str, ...] = "-"):
    """Compose a small run, without the settings of SMALL that start with `without`."""
    settings = [setting for setting in SMALL if not setting.startswith(without)]
    return compose("train", [*settings, *overrides])


@pytest.fixture
def config(tmp_path):
    """Compose a small run in a temporary folder: config("optimizer.lr=0.1", …, folder="run")."""
    return lambda *overrides, folder="run", **settings: small(f"output_dir={tmp_path / folder}", *overrides, **settings)


@pytest.fixture
def resumed_run(config, tmp_path):
    """Check that a run that is stopped and resumed equals one that is not: resumed_run("optimizer.lr=0.1", …).

    `moment` is an epoch and a batch, after which the run is stopped; `meanwhile` is then called. `changes` are
    the settings with which it is resumed. It returns the record of the run, whose folder is `whole`.
    """

    def check(*overrides, compose=config, moment=(1, 2), meanwhile=lambda: None, changes=(), **settings) -> Record:
        train(compose(*overrides, folder="whole", **settings))
        with pytest.raises(Interrupted):
            train(compose(*overrides, folder="parts", **settings), callbacks=[SignalAt(*moment, signal.SIGTERM)])
        meanwhile()
        train(*resume(tmp_path / "parts", changes))
        assert_same_weights(*(tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "parts")))
        whole, parts = (Record.read(tmp_path / name / "metrics.json") for name in ("whole", "parts"))
        assert whole.data == parts.data
        return whole

    return check


@pytest.fixture
def sharded_run(config, tmp_path):
    """Check that a run on two ranks equals one on a single rank, except for rounding: sharded_run("seed=1", …)."""

    def check(*overrides: str, without: tuple[str, ...] = ()) -> None:
        train(config(*overrides, "threads=1", folder="one", without=without))
        train(config(*overrides, *TWO, "threads=1", folder="two", without=("trainer=cpu", *without)))
        assert_close_weights(tmp_path / "one", tmp_path / "two")
        one, two = (Record.read(tmp_path / name / "metrics.json") for name in ("one", "two"))
        assert two.hardware["ranks"] == 2
        assert one.data == two.data

    return check


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a trained SpeedNet, which is tested with mirror images of the least confident."""
    folder = tmp_path_factory.mktemp("trained")
    train(compose("train", [*LEARNS, f"output_dir={folder}"]))
    return folder


@pytest.fixture(autouse=True)
def logs():
    """Remove the log handlers that a test has added."""
    yield
    for logger in (logging.getLogger(), logging.getLogger("cifarnet")):
        for handler in list(logger.handlers):
            if type(handler) in (logging.StreamHandler, logging.FileHandler):
                logger.removeHandler(handler)
                handler.close()


@pytest.fixture
def changed(run, tmp_path):
    """Write a changed copy of the best checkpoint of `run`: changed(lambda content: …) returns its path."""

    def change(alter):
        content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
        alter(content)
        torch.save(content, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return change


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `python -m cifarnet.train …`, or the `main` of another command: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str, main: Callable[[], None] = main) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["cifarnet.train", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def picture(path: Path, colour=(10, 20, 30), size=(32, 32), mode="RGB") -> None:
    """Write an image file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def special(path: Path, kind: str, device: str) -> None:
    """Create a device (only root may do so), a link to a device, a pipe or a folder."""
    if kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.stat(device).st_rdev)
        except PermissionError:
            pytest.skip("only root may create a device")
    elif kind == "link":
        path.symlink_to(device)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.fixture(scope="session")
def photographs() -> Path:
    """A folder of CIFAR-10 as image files, train/<class>/… and test/<class>/…"""
    folder = Path(os.environ.get("CIFARNET_IMAGES", "~/.cache/cifar10-jpeg")).expanduser()
    if not (folder / "train").is_dir():
        pytest.skip(f"no photographs in {folder}: set CIFARNET_IMAGES to an image-folder copy of CIFAR-10")
    return folder


@pytest.fixture
def few_photographs(photographs, tmp_path) -> Path:
    """A folder of 20 training and 5 test images of each class."""
    for split, count in [("train", 20), ("test", 5)]:
        for folder in sorted((photographs / split).iterdir()):
            target = tmp_path / "few" / split / folder.name
            target.mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, target)
    return tmp_path / "few"


@pytest.fixture(scope="session")
def archive() -> dict:
    """A small archive in the official format: its bytes, its checksum, and those of its members."""
    published, random = torchvision.datasets.CIFAR10, np.random.default_rng(0)
    members = {}
    for name, _ in [*published.train_list, *published.test_list]:
        pixels = random.integers(0, 256, (IMAGES_A_FILE, 3072), np.uint8)
        members[name] = pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(IMAGES_A_FILE)]})
    members["batches.meta"] = pickle.dumps({"label_names": CLASS_NAMES})
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{published.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = file.getvalue()
    return {
        "bytes": content,
        "md5": hashlib.md5(content).hexdigest(),
        "members": {name: hashlib.md5(member).hexdigest() for name, member in members.items()},
    }


@pytest.fixture
def published(archive, monkeypatch):
    """Replace the checksums in torchvision by those of the small archive."""
    cls, members = torchvision.datasets.CIFAR10, archive["members"]
    monkeypatch.setattr(cls, "tgz_md5", archive["md5"])
    monkeypatch.setattr(cls, "train_list", [[name, members[name]] for name, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[name, members[name]] for name, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": members["batches.meta"]})
    return cls


def alter(path: Path, change) -> Path:
    """Change the content of a checkpoint file."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path
