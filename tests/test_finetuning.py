"""Fine-tuning: what is kept, what is new, what learns; the run stands on its own when what it began with is gone."""

import hashlib
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

import cifarnet
from cifarnet import cli
from cifarnet.errors import Interrupted, UserError
from cifarnet.finetuning import expanded
from cifarnet.recipes.backbone import head_name
from cifarnet.resuming import resume
from cifarnet.train import main, train
from conftest import LEARNS, assert_same_weights, picture, signal_at, weights

HEAD, NORM = "network.head.weight", "network.normalize.mean"


@pytest.fixture
def base(run, tmp_path):
    """A copy of it, to be lost."""
    return shutil.copytree(run, tmp_path / "base")


@pytest.fixture
def finetune(base, tmp_path):
    """Compose fine-tuning to two classes of colours."""
    for split, count in {"train": 12, "test": 4}.items():
        for name, colour in {"red": (200, 20, 20), "blue": (20, 20, 200)}.items():
            for i in range(count):
                picture(tmp_path / "pictures" / split / name / f"{i}.png", tuple(value + i for value in colour))

    def compose(*overrides, folder="tuned"):
        settings = [f"model.checkpoint={base}", f"data.root={tmp_path}/pictures", f"output_dir={tmp_path / folder}"]
        small = ["data.batch_size=4", "trainer=cpu", "trainer.max_epochs=1", "trainer.precision=32-true", "threads=1"]
        return cli.compose("train", ["+experiment=finetune", *settings, *small, *overrides])

    return compose


def tuned(config) -> dict[str, torch.Tensor]:
    train(config)
    return weights(f"{config.output_dir}/checkpoints/last.ckpt")


def test_the_config_says_what_the_network_is(finetune, base):
    composed = finetune("+model.side_by_side=false")
    before = OmegaConf.to_container(composed)
    config = expanded(composed)
    assert config.model == {"_target_": "cifarnet.models.SpeedNet", "widths": [8, 8, 8], "side_by_side": False}
    file = base / "checkpoints/best.ckpt"
    assert config.start == {"checkpoint": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert OmegaConf.to_container(composed) == before
    assert expanded(config) is config


def test_all_is_kept_but_the_head(finetune, base):
    before = weights(base / "checkpoints/best.ckpt")
    after = tuned(finetune("optimizer.lr=0", "recipe.backbone=null"))
    assert after[HEAD].shape == (2, 8)
    learned = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in learned if "running_" not in key and "num_batches" not in key} == {HEAD}
    assert before[NORM].abs().sum() > 0


def test_it_learns_more_than_the_head_at_a_smaller_rate(finetune, base):
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            (optimizer,) = trainer.optimizers
            seen["rates"] = {group["backbone"]: group["lr"] for group in optimizer.param_groups}
            seen["sizes"] = {group["backbone"]: len(group["params"]) for group in optimizer.param_groups}

    before = weights(base / "checkpoints/best.ckpt")
    config = finetune("scheduler=constant", "recipe.backbone.lr_scale=0.25", "optimizer.lr=0.02")
    train(config, callbacks=[Watch()])
    assert seen["rates"] == {True: pytest.approx(0.005), False: pytest.approx(0.02)}
    assert seen["sizes"][False] == 1
    after = weights(f"{config.output_dir}/checkpoints/last.ckpt")
    assert not torch.equal(before["network.blocks.0.conv1.weight"], after["network.blocks.0.conv1.weight"])


def test_it_says_what_it_began_with_and_what_an_epoch_leaves_out(finetune, base, capsys):
    config = finetune("data.batch_size=8", "scheduler=constant")
    train(config)
    printed = capsys.readouterr().out
    assert f"Begins with the weights of {base}/checkpoints/best.ckpt\n" in printed
    assert "data.batch_size=8: an epoch leaves 6 of 22 images out, others each time.\n" in printed
    config, last = resume(config.output_dir, ["trainer.max_epochs=2"])
    train(config, last)
    assert "Begins with" not in capsys.readouterr().out


def test_what_it_says_of_small_data(finetune, capsys):
    train(finetune("data.batch_size=32"))
    printed = capsys.readouterr().out
    assert "data.batch_size=32: an epoch's 22 images are one batch.\n" in printed
    assert "leaves" not in printed


def test_at_a_rate_of_nothing_the_head_alone_learns(finetune, base):
    before = weights(base / "checkpoints/best.ckpt")
    after = tuned(finetune("recipe.backbone.lr_scale=0", "+recipe=no_decay"))
    start = tuned(finetune("optimizer.lr=0", "recipe.backbone=null", folder="start"))
    assert not torch.equal(after[HEAD], start[HEAD])
    for key in before.keys() - {HEAD}:
        assert "running_" in key or "num_batches" in key or torch.equal(before[key], after[key]), key


def test_of_the_same_classes_the_head_is_kept(base, tmp_path):
    settings = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "scheduler", "module"))]
    given = [f"model.checkpoint={base}", "optimizer.lr=0", f"output_dir={tmp_path}/tuned"]
    after = tuned(cli.compose("train", ["+experiment=finetune", *settings, *given]))
    assert torch.equal(after[HEAD], weights(base / "checkpoints/best.ckpt")[HEAD])


def test_it_stands_on_its_own_and_goes_on(finetune, base, tmp_path):
    """Loaded, and resumed with the weights of a run that was never stopped, when what it began with is gone."""
    two = ["trainer.max_epochs=2"]
    train(finetune(*two, folder="whole"))
    with pytest.raises(Interrupted):
        train(finetune(*two, signal_at(epoch=0, batch=2, number=2), folder="stopped"))
    shutil.rmtree(base)
    config, last = resume(tmp_path / "stopped", ["classes=[conftest.SignalAt]"])
    config.callbacks.signal = None
    train(config, last)
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "stopped/checkpoints/last.ckpt")
    network, names = cifarnet.load(tmp_path / "stopped")
    assert names == ["blue", "red"]
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("scheduler=onecycle trainer.max_epochs=2", "scheduler=OneCycleLR sets every part's rate itself"),
        ("optimizer=muon", "parameter groups .*recipe.backbone"),
        ("recipe.backbone.lr_scale=2", "lr_scale=2: give"),
        (
            "data.image_size=24",
            r"The images are 24 pixels wide; .* was trained on 32. For a folder: data.image_size=32",
        ),
        ("model.checkpoint=nowhere", "There is no checkpoint nowhere"),
        ("+model.widths=[4,4,4]", "does not fit this network: blocks.0"),
        ("model.checkpoint=???", "model.checkpoint is missing: say with which run to begin"),
    ],
)
def test_what_cannot_be_used(finetune, setting, told):
    with pytest.raises(Exception, match=told):
        train(finetune(*setting.split()))


def test_a_sweep_of_it_goes_on(finetune, base, tmp_path, command):
    """From a checkpoint named by its full path; what is done stays, what was stopped goes on."""
    finetune()  # the pictures
    of = [f"model.checkpoint={base}", f"data.root={tmp_path}/pictures"]
    small = ["data.batch_size=4", "trainer=cpu", "trainer.max_epochs=2", "trainer.precision=32-true", "threads=1"]
    status, _, err = command("-m", "+experiment=finetune", *of, *small, "seed=0,1", "hydra.sweep.dir=sweep", main=main)
    assert status == 0, err
    before = weights(tmp_path / "sweep/1/checkpoints/last.ckpt")
    (tmp_path / "sweep/1/metrics.json").unlink()
    assert "Give it in the command: model.checkpoint=…" in command("sweep.resume=sweep", main=main)[2]
    status, out, err = command("sweep.resume=sweep", *of, main=main)
    assert status == 0, err
    assert "Job 0 is done" in out
    assert "Job 1 is done" not in out
    after = weights(tmp_path / "sweep/1/checkpoints/last.ckpt")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("target", ["os.system", "torch.load", "cifarnet.train.train"])
def test_a_stranger_s_checkpoint_runs_nothing(finetune, changed, target):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["config"]["model"] = {"_target_": target, "command": "exit 3"}

    with pytest.raises(UserError, match="asks for"):
        train(finetune(f"model.checkpoint={changed(alter)}"))


def test_a_stranger_s_setting_runs_nothing(finetune, changed):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["config"]["model"]["widths"] = {"_target_": "os.system", "command": "exit 3"}

    with pytest.raises(UserError, match="asks for"):
        train(finetune(f"model.checkpoint={changed(alter)}"))


def test_the_head_is_the_last_layer():
    assert head_name(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))) == "2"
    with pytest.raises(UserError, match="no layer that could be its head"):
        head_name(torch.nn.ReLU())
