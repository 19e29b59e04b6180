import contextlib
import json
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.callbacks.pruning import Prune
from cifarnet.errors import Interrupted, Pruned
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import OWN, assert_same_weights, signal_at


class SignalInTest(Callback):
    """Sends this process a signal while the first of several batches is tested."""

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)


BATCHES = "data.eval_batch_size=10"


def test_a_signal_in_the_test_names_the_command_that_tests(config, tmp_path):
    train(config(BATCHES, folder="whole"))
    with pytest.raises(Interrupted, match="in the test") as interrupted:
        train(config(BATCHES, folder="parts"), callbacks=[SignalInTest()])
    assert interrupted.value.status == 143
    assert str(tmp_path / "parts/checkpoints/last.ckpt") in str(interrupted.value)
    assert not (tmp_path / "parts/metrics.json").exists()
    train(*resume(tmp_path / "parts"))
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    for key in ("test_accuracy", "test_cross_entropy", "val_accuracy", "tested_epoch", "history"):
        assert whole[key] == parts[key]


@pytest.mark.parametrize("without", [["callbacks.best=null", "+trainer.enable_checkpointing=false"], []])
def test_a_run_without_a_last_checkpoint_finishes_its_test(config, tmp_path, without):
    train(config(BATCHES, "callbacks.last=null", *without), callbacks=[SignalInTest()])
    assert (tmp_path / "run/metrics.json").is_file()


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_signal_in_an_epoch_that_is_not_validated_saves_it(config, tmp_path, epoch):
    recipe = ["trainer.max_epochs=4", "+trainer.check_val_every_n_epoch=2", "optimizer.lr=0.02"]
    train(config(*recipe, folder="whole"))
    with pytest.raises(Interrupted, match=f"epoch {epoch + 1}, which is complete"):
        train(config(*recipe, signal_at(epoch, 4, signal.SIGTERM), folder="parts"))  # five batches an epoch
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5 * (epoch + 1)
    train(*resume(last, [OWN]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", last)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]


class Twice(Callback):
    """Sends this process two signals."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for number in (signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)


def test_in_a_slurm_job_a_second_signal_changes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(Interrupted, match="Stopped by SIGUSR2 after batch 2 of epoch 1") as interrupted:
        train(config(), callbacks=[Twice()])
    assert interrupted.value.status == 128 + signal.SIGUSR2
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_how_many_epochs_are_complete_is_told(config):
    with pytest.raises(Interrupted, match="after batch 4 of epoch 2: 1 of 2 epochs are complete"):
        train(config(signal_at(1, 2, signal.SIGTERM)))


class Trial:
    """Stands for Optuna's; it gives up where it is told so."""

    def __init__(self, gives_up: bool) -> None:
        self.told, self.gives_up = {}, gives_up

    def report(self, value: float, step: int) -> None:
        assert step not in self.told  # a study would keep the first one
        self.told[step] = value

    def should_prune(self) -> bool:
        return self.gives_up


@pytest.mark.parametrize("more", [[], ["+trainer.val_check_interval=1", "+trainer.num_sanity_val_steps=1"]])
def test_a_trial_is_told_each_epochs_validation_accuracy(config, tmp_path, more):
    trial = Trial(gives_up=False)
    train(config("optimizer.lr=0.02", "trainer.max_epochs=3", *more), callbacks=[Prune(trial)])
    history = json.loads((tmp_path / "run/metrics.json").read_text())["history"]
    assert trial.told == {row["epoch"]: row["val/accuracy"] for row in history}
    assert len(trial.told) == 3


@pytest.mark.parametrize(("epochs", "pruned"), [(2, True), (1, False)])
def test_a_trial_is_given_up_before_its_last_epoch(config, tmp_path, epochs, pruned):
    settings, trial = config(f"trainer.max_epochs={epochs}", "scheduler=constant"), Trial(gives_up=True)
    with pytest.raises(Pruned, match="after epoch 1 of 2") if pruned else contextlib.nullcontext():
        train(settings, callbacks=[Prune(trial)])
    assert list(trial.told) == [1]
    assert (tmp_path / "run/metrics.json").exists() == (not pruned)
