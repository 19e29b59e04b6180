import contextlib
import math
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.build import make_trainer
from cifarnet.callbacks.divergence import StopOnDivergence
from cifarnet.errors import Diverged
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, SMALL, assert_same_weights, signal_at


class Overflow(Callback):
    """Fills a weight with infinity after a batch of an epoch (both count from 0)."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.moment = (epoch, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.moment:
            next(module.network.parameters()).data.fill_(torch.inf)


@pytest.mark.parametrize(
    ("batch", "overrides"),
    [
        (1, ()),
        (4, ()),  # the last batch of the epoch: the validation fails
        (4, ("data.val_fraction=0", "data.train_size=180")),  # the next checkpoint would be saved after the epoch
        (1, (signal_at(1, 1, signal.SIGTERM), ALLOW_SIGNAL)),
    ],
)
def test_checkpoints_keep_the_weights_before_a_divergence(config, tmp_path, batch, overrides):
    train(config("trainer.max_epochs=1", "scheduler=constant", *overrides, folder="short"))
    with pytest.raises(Diverged, match=r"epoch 2.*learning rate 0\.05.*optimizer\.lr.*trainer\.detect_anomaly"):
        train(config("scheduler=constant", *overrides), callbacks=[Overflow(1, batch)])
    for name in ("best.ckpt", "last.ckpt") if (tmp_path / "short/checkpoints/best.ckpt").exists() else ("last.ckpt",):
        assert_same_weights(tmp_path / "short/checkpoints" / name, tmp_path / "run/checkpoints" / name)
    assert not (tmp_path / "run/metrics.json").exists()


def test_a_loss_of_nan_stops_a_run_within_the_epoch(command, tmp_path):
    status, _, err = command(*SMALL, "threads=1", "optimizer.lr=1e15", "data.train_size=5000", "hydra.run.dir=run")
    assert status == 1
    assert "Training diverged in epoch 1" in err
    assert "optimizer.lr" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_loss_is_read_rarely(config, monkeypatch):
    """Each read makes the host wait for the GPU."""
    checks = []
    monkeypatch.setattr("cifarnet.callbacks.divergence.StopOnDivergence._check", lambda *_: checks.append(1))
    train(config("data.train_size=4000", "data.batch_size=16", "trainer.max_epochs=1"))
    assert len(checks) == 2 + 1 + 1 + 3  # batches 100 and 200, the last batch, the validation, three checkpoints


def test_the_check_can_be_switched_off(config, tmp_path):
    record = train(config("scheduler=constant", "callbacks.nan=null"), callbacks=[Overflow(1, 1)])
    assert record.epochs == 2
    assert math.isnan(record.history[-1]["train/cross_entropy"])
    lean = config("callbacks=lean", "callbacks.nan=null", folder="lean")
    assert not any(isinstance(callback, StopOnDivergence) for callback in make_trainer(lean).callbacks)


@pytest.mark.parametrize("section", ["callbacks=lean", "~callbacks", "~callbacks.nan"])  # as in older records
def test_the_check_is_the_default(config, section):
    with pytest.raises(Diverged):
        train(config("scheduler=constant", section), callbacks=[Overflow(0, 1)])


@pytest.mark.parametrize(("scale", "diverges"), [(65536.0, False), (0.5, True)])
def test_a_scaler_may_skip_some_steps_but_not_all(config, scale, diverges):
    class Overflows(Callback):
        """The loss of a batch overflows, and the scaler of float16, which a CPU run lacks, skips the step."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            module.sums["train"] += torch.inf

    settings = config("trainer.max_epochs=1", "scheduler=constant", "callbacks=lean", "data.val_fraction=0")
    with pytest.raises(Diverged) if diverges else contextlib.nullcontext():
        train(settings, callbacks=[Overflows()])
