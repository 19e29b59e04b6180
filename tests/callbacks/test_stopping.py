import json
import os
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import Interrupted
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at


class SignalInTest(Callback):
    """Sends this process a signal while the first of several batches is tested."""

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)


BATCHES = "data.eval_batch_size=10"


def test_a_run_that_was_stopped_in_the_test_can_be_resumed(config, tmp_path):
    train(config(BATCHES, folder="whole"))
    with pytest.raises(Interrupted, match="during the test") as interrupted:
        train(config(BATCHES, folder="parts"), callbacks=[SignalInTest()])
    assert interrupted.value.status == 143
    assert str(tmp_path / "parts/checkpoints/last.ckpt") in str(interrupted.value)
    assert not (tmp_path / "parts/metrics.json").exists()
    train(*resume(tmp_path / "parts"))
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    for key in ("test_accuracy", "test_cross_entropy", "val_accuracy", "tested_epoch", "history"):
        assert whole[key] == parts[key]


@pytest.mark.parametrize("without", [["callbacks.best=null", "+trainer.enable_checkpointing=false"], []])
def test_without_a_last_checkpoint_the_test_is_completed(config, tmp_path, without):
    train(config(BATCHES, "callbacks.last=null", *without), callbacks=[SignalInTest()])
    assert (tmp_path / "run/metrics.json").is_file()


@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_without_validation_is_saved_when_a_signal_stops_the_run(config, tmp_path, epoch):
    recipe = ["trainer.max_epochs=4", "+trainer.check_val_every_n_epoch=2", "optimizer.lr=0.02"]
    train(config(*recipe, folder="whole"))
    with pytest.raises(Interrupted, match=f"epoch {epoch + 1}, which is complete"):
        train(config(*recipe, signal_at(epoch, 4, signal.SIGTERM), folder="parts"))  # five batches an epoch
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5 * (epoch + 1)
    train(*resume(last, [ALLOW_SIGNAL]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", last)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]


EARLY = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/accuracy, mode: max, patience: 1}"
ENDS = {
    "early": ["trainer.max_epochs=8", "optimizer.lr=1e-9", f"+callbacks.early={EARLY}"],  # in the second epoch
    "steps": ["trainer.max_epochs=-1", "scheduler=constant", "+trainer.max_steps=8"],  # within the second epoch
    "not validated": ["trainer.max_epochs=2", "+trainer.check_val_every_n_epoch=3", "callbacks.best=null"],
}


@pytest.mark.parametrize("settings", ENDS.values(), ids=ENDS)
def test_a_run_whose_training_has_ended_is_only_tested(config, tmp_path, settings):
    """A signal arrives in its last batch, or in the test."""
    last_batch = signal_at(1, 3 if "+trainer.max_steps=8" not in settings else 1, signal.SIGTERM)
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted, match="epoch 2, the last one"):
        train(config(*settings, last_batch, folder="parts"))
    checkpoints = sorted(tmp_path.glob("parts/checkpoints/*"))
    before = [file.read_bytes() for file in checkpoints]
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    assert [file.read_bytes() for file in checkpoints] == before
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    for key in ("test_cross_entropy", "val_accuracy", "tested_epoch", "tested_step", "epochs", "history"):
        assert whole[key] == parts[key], key


def test_a_run_that_was_stopped_early_can_be_extended(config, tmp_path):
    train(config(*ENDS["early"], "scheduler=constant"))
    train(*resume(tmp_path / "run", ["trainer.max_epochs=9"]))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]


class TwoSignals(Callback):
    """Sends this process two signals."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for number in (signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)


def test_in_a_slurm_job_a_second_signal_is_ignored(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(Interrupted, match="Stopped by SIGUSR2 after batch 1 of epoch 1") as interrupted:
        train(config(), callbacks=[TwoSignals()])
    assert interrupted.value.status == 128 + signal.SIGUSR2
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


def test_the_message_gives_the_number_of_complete_epochs(config):
    with pytest.raises(Interrupted, match="after batch 4 of epoch 2: 1 of 2 epochs are complete"):
        train(config(signal_at(1, 2, signal.SIGTERM)))


class SecondSignal(Callback):
    """Sends this process a signal, and another one some seconds later, as a user who does not want to wait."""

    def __init__(self, clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        self.clock[0] += 2
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_without_saving(config, tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning turns the former into the latter
        train(config(), callbacks=[SecondSignal(clock)])
    assert "Ctrl-C again" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
