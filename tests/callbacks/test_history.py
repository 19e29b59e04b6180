import json
from types import SimpleNamespace

import pytest
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


@pytest.mark.parametrize(
    ("waiting", "threads", "fewer"),
    [(1.4, 2, 1), (0.3, 2, 1), (0.2, 2, None), (0.9, 1, None), (4.5, 32, 27), (3.5, 32, None)],
)
def test_a_busy_machine_is_reported_once(config, monkeypatch, capsys, waiting, threads, fewer):
    """`waiting` is the number of threads that wait for a core at a time."""
    clock = Clock()
    monkeypatch.setattr(history, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(history.hardware, "waiting_seconds", lambda: 50 + waiting * clock.now)
    monkeypatch.setattr(history, "torch", SimpleNamespace(get_num_threads=lambda: threads))
    train(config("threads=1", "callbacks.pictures=null"), callbacks=[clock])  # 5 batches and 1 for validation
    lines = [line for line in capsys.readouterr().out.splitlines() if "machine is busy" in line]
    assert len(lines) == (fewer is not None)
    assert not lines or f"the {threads} threads waited {105 * waiting:.0f} s in total" in lines[0]
    assert not lines or lines[0].endswith(f" threads={fewer}")


def test_a_short_epoch_is_not_checked(config, monkeypatch, capsys):
    monkeypatch.setattr(history.hardware, "waiting_seconds", iter([0.0, 100.0]).__next__)
    monkeypatch.setattr(history, "torch", SimpleNamespace(get_num_threads=lambda: 2))
    train(config("threads=1", "trainer.max_epochs=1", "scheduler=constant", "callbacks=lean"))
    assert "machine is busy" not in capsys.readouterr().out
