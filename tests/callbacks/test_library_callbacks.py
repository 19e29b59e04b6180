"""Callbacks and settings of Lightning in a run that is stopped and resumed."""

import signal

import pytest

from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at


def library(name: str, arguments: str) -> str:
    return f"+callbacks.library={{_target_: lightning.pytorch.callbacks.{name}, {arguments}}}"


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (library("StochasticWeightAveraging", "swa_lrs: 0.01"), r"\+recipe=swa"),
        (library("BackboneFinetuning", "verbose: false"), r"recipe\.backbone"),
        (library("OnExceptionCheckpoint", "dirpath: '${output_dir}'"), "Remove it"),
        (library("SpikeDetection", "warmup: 1"), "Remove it"),
        ("+callbacks.last.save_on_exception=true", "Remove it"),
    ],
)
def test_callbacks_that_could_not_be_resumed_are_refused(config, callback, remedy):
    with pytest.raises(UserError, match=f"is not supported.*{remedy}|resumed exactly.*{remedy}"):
        train(config(callback))


@pytest.mark.parametrize(
    "settings",
    [
        [library("EMAWeightAveraging", "decay: 0.5")],  # updated after each batch
        ["+trainer.reload_dataloaders_every_n_epochs=1", "data.hardest_share=0.5", "data.batch_size=16"],
    ],
)
def test_other_callbacks_and_settings_are_resumed_exactly(config, tmp_path, settings):
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*settings, signal_at(1, 1, signal.SIGTERM), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(tmp_path / "whole/checkpoints" / name, tmp_path / "parts/checkpoints" / name)


def test_a_new_loader_for_each_epoch_selects_the_same_images(config, tmp_path):
    settings = ["data.hardest_share=0.5", "data.batch_size=16"]
    train(config(*settings, folder="once"))
    train(config(*settings, "+trainer.reload_dataloaders_every_n_epochs=1", folder="each"))
    assert_same_weights(*(tmp_path / name / "checkpoints/last.ckpt" for name in ("once", "each")))
