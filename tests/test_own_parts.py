"""Classes of a user in place of this project's own: callbacks, modules and schedules that must keep working."""

from datetime import datetime

import pytest
from hydra.core.utils import setup_globals
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from cifarnet import cli
from cifarnet.checkpoint import Checkpoint
from cifarnet.classifier import Classifier
from cifarnet.records.record import Record
from cifarnet.resuming import resume
from cifarnet.train import train


class Count(Callback):
    """Creates its state when training starts."""

    def on_train_start(self, trainer, module):
        self.batches = getattr(self, "batches", 0)

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class Module(Classifier):
    """Logs a metric of its own."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val/own", 1.0 + self.current_epoch)


class Picky(ConstantLR):
    """A schedule that only accepts the optimizer of the run."""

    def __init__(self, optimizer):
        assert isinstance(optimizer, SGD)
        super().__init__(optimizer, factor=0.5)


def test_a_callback_may_create_its_state_when_training_starts(config, tmp_path):
    train(config("+callbacks.count={_target_: test_own_parts.Count}"))
    content = Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt").content
    assert content["callbacks"]["Count"] == {"batches": content["global_step"]}


def test_a_metric_of_a_module_can_be_monitored(config, tmp_path):
    train(config("module._target_=test_own_parts.Module", "callbacks.best.monitor=val/own"))
    assert Record.read(tmp_path / "run/metrics.json").tested_epoch == 2  # the largest value


def test_a_schedule_is_built_only_from_the_optimizer_of_the_run(config, tmp_path):
    train(config("~scheduler", "+scheduler={_target_: test_own_parts.Picky}", without="scheduler"))
    rates = [row["learning_rate"] for row in Record.read(tmp_path / "run/metrics.json").history]
    assert rates == [0.025, 0.05]  # half of it for five steps


@pytest.mark.parametrize("fraction", [0, 0.1])
def test_the_last_checkpoint_has_the_number_of_the_last_epoch(config, tmp_path, fraction):
    train(config(f"data.val_fraction={fraction}"))
    assert Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt").epoch == 2
    assert Record.read(tmp_path / "run/metrics.json").tested_epoch <= 2


def test_settings_of_loggers_keep_only_resolvers_that_could_contain_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", "secret")
    config = OmegaConf.create({"logger": {"a": "${oc.env:A_TOKEN}", "b": "run_${now:%Y}"}, "c": "${oc.env:A_TOKEN}"})
    setup_globals()  # registers Hydra's resolver `now`
    written = cli.without_resolvers(config, "logger")
    assert written == {"logger": {"a": "${oc.env:A_TOKEN}", "b": f"run_{datetime.now():%Y}"}, "c": "secret"}


def test_a_recorded_name_of_the_run_in_a_logger_can_be_resumed(config, tmp_path):
    train(config("+logger={csv: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '${output_dir}'}}"))
    resume(tmp_path / "run")
