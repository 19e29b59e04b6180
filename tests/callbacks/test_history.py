import json
from types import SimpleNamespace

from lightning.pytorch.callbacks import Callback

from cifarnet.callbacks import history
from cifarnet.train import train


class Clock(Callback):
    """A clock that advances by a fixed number of seconds in each hook."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now += 1

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.now += 100

    def on_train_epoch_end(self, trainer, module):
        self.now += 1000

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.now += 7


def test_seconds_are_those_of_training_batches(config, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(history, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    train(config("+trainer.val_check_interval=2"), callbacks=[clock])  # of five batches in each of two epochs
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert clock.now > 2400
    assert (metrics["seconds"], metrics["test_seconds"], metrics["images_per_second"]) == (10, 7, 32)
