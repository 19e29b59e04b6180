import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cifarnet import checkpoint
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import OWN, signal_at, small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(small(f"output_dir={folder}", "trainer.max_epochs=1", "data.train_size=300"))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A finished run's folder, of its own for each test."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_folder_and_file_give_the_recorded_config(run):
    config, path = resume(run)
    assert path == run / "checkpoints/last.ckpt"
    assert resume(path) == (config, path)
    recorded = json.loads((run / "metrics.json").read_text())["config"]
    assert OmegaConf.to_container(config) == recorded | {"output_dir": str(run)}
    with pytest.raises(UserError, match=r"output_dir=x: a run goes on with the settings it began with"):
        resume(run, ["output_dir=x"])


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("data.root=elsewhere", "data.root", "elsewhere"),
        ("threads=1", "threads", 1),
        ("trainer.precision=bf16-mixed", "trainer.precision", "bf16-mixed"),
        ("trainer=gpu", "trainer.accelerator", "gpu"),
        ("logger=csv", "logger.csv._target_", "lightning.pytorch.loggers.CSVLogger"),
        ("logger=[csv,mlflow]", "logger.mlflow.tracking_uri", "sqlite:///{run}/mlflow.db"),
        ("logger.tensorboard.version=mine", "logger.tensorboard.version", "mine"),
        ("~logger", "logger", None),
        ("+data.workers=2", "data.workers", 2),
        ("module.tta=mirror", "module.tta", "mirror"),
    ],
)
def test_what_no_weight_depends_on_may_change(run, override, where, value):
    config, _ = resume(run, [override])
    assert OmegaConf.select(config, where) == (value.format(run=run) if isinstance(value, str) else value)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0.2",
        "seed=1",
        "+experiment=baseline",
        "model=speednet",
        "data.flip=none",
        "~callbacks",
        "threads=1,2",
    ],
)
def test_all_else_is_refused(run, override):
    with pytest.raises(UserError, match=r"a run goes on with the settings it began with"):
        resume(run, [override])


def test_flags_of_hydras_are_refused(run):
    with pytest.raises(UserError, match="goes on with one run, as it was recorded: leave out -m"):
        resume(run, ["-m", "threads=1"])


def test_epochs_may_be_added_where_the_schedule_allows_it(run, config, tmp_path):
    with pytest.raises(UserError, match=r"max_epochs=3: the schedule OneCycleLR was planned for 1 epochs"):
        resume(run, ["trainer.max_epochs=3"])
    constant = ["scheduler=constant", "model.drop_rate=0.2"]
    train(config(*constant, "trainer.max_epochs=3", folder="whole"))
    train(config(*constant, "trainer.max_epochs=1", folder="parts"))
    train(*resume(tmp_path / "parts", ["trainer.max_epochs=3"]))
    whole, parts = (checkpoint.read(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts["state_dict"][name]) for name, weight in whole["state_dict"].items())
    metrics = json.loads((tmp_path / "parts/metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    assert [session["from_step"] for session in metrics["sessions"]] == [0, 5]


def test_numbers_may_be_keys(config, tmp_path):
    twice = "{_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 1, 1: 2}}"
    train(config(f"+callbacks.twice={twice}", "trainer.max_epochs=1", "scheduler=constant"))
    train(*resume(tmp_path / "run", ["trainer.max_epochs=2"]))
    assert checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 5 + 3


def test_other_images_are_refused(run):
    config, path = resume(run)
    config.data.train_size = 200
    with pytest.raises(UserError, match=r"trained on other images: images was 270, now 180"):
        train(config, path)


def test_another_precision_is_told_and_recorded(config, tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(config(signal_at(0, 2, signal.SIGTERM)))
    train(*resume(tmp_path / "run", [OWN, "trainer.precision=bf16-mixed"]))
    assert "precision was 32-true, now bf16-mixed" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [session["precision"] for session in metrics["sessions"]] == ["32-true", "bf16-mixed"]
    assert metrics["precision"] == "bf16-mixed"
    assert all(session["hardware"]["device"] == "cpu" and "git_commit" in session for session in metrics["sessions"])


def test_missing_and_damaged_checkpoints_are_told(run):
    with pytest.raises(UserError, match="There is no checkpoint"):
        resume(run / "nothing.ckpt")
    last = run / "checkpoints/last.ckpt"
    content = last.read_bytes()
    last.write_bytes(content[:5000])
    with pytest.raises(UserError, match="not a checkpoint of cifarnet, or is damaged"):
        resume(run)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1  # in the middle of the weights
    last.write_bytes(flipped)
    with pytest.raises(UserError, match=r"the checksum of .* is wrong"):
        resume(run)


def test_a_checkpoint_whose_config_has_no_trainer_is_told_as_damaged(run):
    last = run / "checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    content["hyper_parameters"]["config"]["trainer"] = "text"
    torch.save(content, last)
    with pytest.raises(UserError, match=r"last\.ckpt is damaged: its config has no trainer"):
        resume(run)


def test_a_link_in_a_strangers_run_leads_nowhere(run, tmp_path):
    (run / "train.log").unlink(missing_ok=True)
    (run / "train.log").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link that leads out of"):
        resume(run)


@pytest.mark.parametrize("part", ["loops", "optimizer_states", "callbacks", "middle_of_epoch", "lr_schedulers"])
@pytest.mark.parametrize("value", [None, [], "text"], ids=["missing", "empty", "text"])
def test_a_checkpoint_that_lacks_a_part_is_told_as_damaged(run, part, value):
    last = run / "checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    content[part] = value
    if value is None:
        del content[part]
    torch.save(content, last)
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        train(*resume(run))


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("callbacks", {"x": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False}}),
        ("callbacks", {"x": {"_target_": "torch.utils.collect_env.run", "command": "touch exploded"}}),
        ("recipe", {"x": {"_target_": "torch.hub.load", "repo_or_dir": "a/b", "model": "c"}}),
        ("logger", {"_target_": "numpy.load", "file": "evil.npy", "allow_pickle": True}),
        ("optimizer", {"_target_": "shutil.copy", "src": "/etc/hosts", "dst": "exploded", "lr": 1}),
        ("scheduler", {"_target_": "os.mkdir", "path": "exploded"}),
        ("objective", {"_target_": "cifarnet.train.train"}),
        ("model", {"_target_": "cifarnet.models.CNN", "widths": [{"_target_": "os.mkdir", "path": "exploded"}]}),
        ("data", {"_target_": "cifarnet.data.Synthetic", "mix": {"_target_": "os.mkdir", "path": "exploded"}}),
        ("trainer", {"_target_": "os.system", "command": "touch exploded", "max_epochs": 1, "precision": "32-true"}),
        ("module", {"_target_": "subprocess.run", "args": ["touch", "exploded"]}),
        ("callbacks", {"x": {"_target_": "lightning.pytorch.callbacks.os.mkdir", "name": "exploded"}}),
        ("callbacks", {"x": {"_target_": "cifarnet.system.hardware.end_with_parent"}}),
        ("extra", {"_target_": "os.mkdir", "path": "exploded"}),
        ("name", "${oc.env:HOME}"),
        ("callbacks", {"x": {"_target_": "lightning.pytorch.callbacks.ModelSummary", "y": ({"_target_": "os.fork"},)}}),
        ("objective", {"_target_": "torch.nn.ParameterDict", "parameters": ({"_target_": "os.mkdir"},)}),
        ("name", b"/tmp"),
        ("objective", "${${name}:{_target_:os.mkdir,path:exploded}}"),
        ("callbacks", {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "~"}}),
        (
            "callbacks",
            {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "${output_dir}/.."}},
        ),
        ("callbacks", {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "_args_": ["/tmp"]}}),
        (
            "callbacks",
            {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "${output_dir}${name}"}},
        ),
        ("callbacks", {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "../exploded"}}),
        ("logger", {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "${output_dir}", "name": "/tmp"}),
        ("name", "/tmp"),
        ("callbacks", {"x": {"_target_": "joblib.load", "filename": "evil.pkl"}}),
        ("callbacks", {"x": {"_target_": "urllib.request.urlretrieve", "url": "http://127.0.0.1", "filename": "x"}}),
        ("data", {"_target_": "cifarnet.data.ImageFolder", "root": "/nowhere/at/all"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_strangers_checkpoint_runs_nothing(run, tmp_path, monkeypatch, section, value):
    monkeypatch.chdir(tmp_path)
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    content["hyper_parameters"]["config"][section] = value
    content["hyper_parameters"]["config"]["classes"] = ["os.mkdir", "torch.load"]  # allowed by the user alone
    torch.save(content, tmp_path / "evil.ckpt")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=r"which is no class that this project lists|asks the machine for"):
        resume(tmp_path / "evil.ckpt")
    assert sorted(os.listdir(tmp_path)) == before


ADDRESSES = {
    "mlflow": {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "http://evil"},
    "wandb": {
        "_target_": "lightning.pytorch.loggers.WandbLogger",
        "offline": False,
        "settings": {"base_url": "http://evil"},
    },
    "comet": {"_target_": "lightning.pytorch.loggers.CometLogger", "workspace": "evil"},
}


@pytest.mark.parametrize(
    ("recorded", "kept"),
    [
        (ADDRESSES, ["mlflow", "wandb"]),
        ({"csv": ADDRESSES["mlflow"]}, ["mlflow"]),
        (ADDRESSES["wandb"], ["wandb"]),
        ({"mlflow": None}, []),
        ("evil", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_address_of_a_strangers_is_logged_to(run, capsys, recorded, kept):
    path = run / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["config"]["logger"] = recorded
    torch.save(content, path)
    config, _ = resume(run)
    ours = small(f"logger=[{','.join(kept or [])}]").get("logger", {} if kept == [] else None)
    assert OmegaConf.create({"logger": config.logger}) == OmegaConf.create({"logger": ours})
    assert "evil" not in str(OmegaConf.to_container(config)["logger"])
    printed = capsys.readouterr().out
    assert ("Not taken from the checkpoint: logger." in printed) == ("evil" in str(recorded) and kept is not None)
    if "mlflow" in (kept or []):
        config, _ = resume(run, ["logger.mlflow.tracking_uri=http://mine"])
        assert config.logger.mlflow.tracking_uri == "http://mine"


def test_a_class_that_is_allowed_does_not_allow_others_of_its_name(config, tmp_path):
    """`conftest.SignalAt` is the user's; another module's `SignalAt` is not what is built."""
    with pytest.raises(Interrupted):
        train(config(signal_at(0, 2, signal.SIGTERM)))
    path = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["config"]["callbacks"]["signal"]["_target_"] = "evil.SignalAt"
    torch.save(content, path)
    resumed, _ = resume(path, [OWN])
    assert resumed.callbacks.signal._target_ == "conftest.SignalAt"


def test_a_run_that_was_moved_keeps_its_best_checkpoint(config, tmp_path):
    slower = ["scheduler=constant", "optimizer.lr=1e-9", "trainer.max_epochs=1"]  # later epochs are no better
    train(config(*slower, folder="old"))
    (tmp_path / "old").rename(tmp_path / "new")
    train(*resume(tmp_path / "new", ["trainer.max_epochs=2"]))
    metrics = json.loads((tmp_path / "new/metrics.json").read_text())
    assert (metrics["epochs"], metrics["tested_epoch"]) == (2, 1)
    train(*resume(tmp_path / "new", ["module.tta=mirror"]))  # no epoch is left
    assert json.loads((tmp_path / "new/metrics.json").read_text())["tested_epoch"] == 1


def test_a_checkpoint_that_was_moved_gets_a_folder_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "alone.ckpt")
    config, _ = resume(alone)
    assert config.output_dir.startswith(str(tmp_path / "lightning_logs/resumed"))
