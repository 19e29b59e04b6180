import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cifarnet.checkpoint import Checkpoint
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, alter, assert_same_weights, signal_at, small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(small(f"output_dir={folder}", "trainer.max_epochs=1", "data.train_size=300"))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_folder_stands_for_its_last_checkpoint_and_gives_the_recorded_config(run):
    config, checkpoint = resume(run)
    assert checkpoint.path == run / "checkpoints/last.ckpt"
    assert resume(checkpoint.path)[0] == config
    recorded = json.loads((run / "metrics.json").read_text())["config"]
    data = recorded["data"] | {"read_only": True}
    assert OmegaConf.to_container(config) == recorded | {"output_dir": str(run), "data": data}


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("data.root=elsewhere", "data.root", "elsewhere"),
        ("data.labels=moved.txt", "data.labels", "moved.txt"),
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
def test_settings_that_do_not_affect_the_weights_can_be_changed(run, override, where, value):
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
        "output_dir=x",
        "name=x",
        "+sweep.resume=x",
        "trainer.max_steps=3",
        "+recipe.mine=1",
    ],
)
def test_all_other_settings_are_refused(run, override):
    with pytest.raises(UserError, match=rf"^{re.escape(override)}: when you resume a run, .*Remove the setting"):
        resume(run, [override])


def test_options_of_hydra_are_refused(run):
    with pytest.raises(UserError, match="resumes one run: remove -m"):
        resume(run, ["-m", "threads=1"])


def test_epochs_can_be_added_if_the_schedule_is_constant(run, config, tmp_path):
    with pytest.raises(
        UserError,
        match=r"max_epochs=3: the schedule .*OneCycleLR was planned for 1 epochs",
    ):
        resume(run, ["trainer.max_epochs=3"])
    constant = ["scheduler=constant", "model.drop_rate=0.2"]
    train(config(*constant, "trainer.max_epochs=3", folder="whole"))
    train(config(*constant, "trainer.max_epochs=1", folder="parts"))
    train(*resume(tmp_path / "parts", ["trainer.max_epochs=3"]))
    assert_same_weights(*(tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "parts")))
    metrics = json.loads((tmp_path / "parts/metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    assert [session["from_step"] for session in metrics["sessions"]] == [0, 5]


def test_keys_of_a_recorded_config_can_be_numbers(config, tmp_path):
    twice = "{_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 1, 1: 2}}"
    train(config(f"+callbacks.twice={twice}", "trainer.max_epochs=1", "scheduler=constant"))
    train(*resume(tmp_path / "run", ["trainer.max_epochs=2"]))
    assert Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt").step == 5 + 3


def test_other_images_are_refused(run):
    config, checkpoint = resume(run)
    config.data.train_size = 200
    with pytest.raises(UserError, match=r"trained on other images: num_images was 270 and is now 180.*data\.root="):
        train(config, checkpoint)


def test_a_config_of_another_network_is_refused(run):
    config, checkpoint = resume(run)
    config.model.hidden = 24
    with pytest.raises(UserError, match=r"weights in .*last\.ckpt do not fit the network"):
        train(config, checkpoint)


def test_another_precision_is_reported_and_recorded(config, tmp_path, capsys, recwarn):
    with pytest.raises(Interrupted):
        train(config(signal_at(0, 2, signal.SIGTERM)))
    train(*resume(tmp_path / "run", [ALLOW_SIGNAL, "trainer.precision=bf16-mixed"]))
    assert "precision was 32-true and is now bf16-mixed" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "not resumable" not in "".join(str(warning.message) for warning in recwarn)
    assert [session["precision"] for session in metrics["sessions"]] == ["32-true", "bf16-mixed"]
    assert metrics["precision"] == "bf16-mixed"
    assert all(session["hardware"]["device"] == "cpu" and "git_commit" in session for session in metrics["sessions"])


def test_weights_in_float64_are_not_rounded(config, tmp_path):
    settings = ["trainer.precision=64-true", "optimizer.lr=0.02"]
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*settings, signal_at(1, 2, signal.SIGINT), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")


def test_missing_and_damaged_checkpoints_are_reported(run):
    with pytest.raises(UserError, match="no checkpoint found"):
        resume(run / "nothing.ckpt")
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"last\.ckpt is not a readable cifarnet checkpoint"):
        resume(run)
    last.unlink()
    with pytest.raises(UserError, match=r"last\.ckpt: no checkpoint found"):  # not the best one instead
        resume(run)


def test_a_link_that_leads_out_of_the_run_is_refused(run, tmp_path):
    (run / "train.log").unlink(missing_ok=True)
    (run / "train.log").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link to a place outside"):
        resume(run)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("callbacks", {"x": {"_target_": "shutil.rmtree", "path": "/nowhere"}}),
        ("trainer", {"_target_": "os.system", "command": "touch exploded", "max_epochs": 1, "precision": "32-true"}),
        ("model", {"_target_": "cifarnet.models.CNN", "widths": [{"_target_": "os.mkdir", "path": "exploded"}]}),
        ("objective", {"_target_": "torch.nn.ParameterDict", "parameters": ({"_target_": "os.mkdir"},)}),
        ("extra", {"_target_": "os.mkdir", "path": "exploded"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_classes_of_other_packages_need_the_users_permission(run, tmp_path, monkeypatch, section, value):
    monkeypatch.chdir(tmp_path)
    recorded = {section: value, "classes": ["os.mkdir", "os.system", "shutil.rmtree"]}  # only the command allows
    alter(run / "checkpoints/last.ckpt", lambda content: content["hyper_parameters"]["config"].update(recorded))
    with pytest.raises(UserError, match=r"last\.ckpt names the class (os|shutil)\.\w+\..*classes=\["):
        resume(run)
    assert not Path("exploded").exists()


def test_a_class_that_the_command_allows_is_used(config, tmp_path):
    with pytest.raises(Interrupted):
        train(config(signal_at(0, 2, signal.SIGTERM)))
    with pytest.raises(UserError, match=r"names the class conftest\.SignalAt\..*classes=\[conftest\.SignalAt\]"):
        resume(tmp_path / "run")
    resumed, _ = resume(tmp_path / "run", [ALLOW_SIGNAL])
    assert resumed.callbacks.signal._target_ == "conftest.SignalAt"
    assert resumed.classes == ["conftest.SignalAt"]


def test_a_run_that_was_moved_keeps_its_best_checkpoint(config, tmp_path):
    slower = ["scheduler=constant", "optimizer.lr=1e-9", "trainer.max_epochs=1"]  # later epochs are not better
    train(config(*slower, folder="old"))
    (tmp_path / "old").rename(tmp_path / "new")
    train(*resume(tmp_path / "new", ["trainer.max_epochs=2"]))
    metrics = json.loads((tmp_path / "new/metrics.json").read_text())
    assert (metrics["epochs"], metrics["tested_epoch"]) == (2, 1)
    train(*resume(tmp_path / "new", ["module.tta=mirror"]))  # no epoch is left to train
    assert json.loads((tmp_path / "new/metrics.json").read_text())["tested_epoch"] == 1


def test_a_checkpoint_outside_of_a_run_gets_a_new_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "alone.ckpt")
    config, _ = resume(alone)
    assert config.output_dir.startswith(str(tmp_path / "lightning_logs/resumed"))
