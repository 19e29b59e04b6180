"""An optimizer of timm, with a list as a setting."""

import signal

import pytest

from cifarnet.errors import Interrupted
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at

LION = ["optimizer=lion", "optimizer.betas=[0.9,0.98]", "scheduler=linear", "trainer.max_epochs=2"]


def test_a_resumed_run_with_lion_equals_an_uninterrupted_one(config, tmp_path):
    train(config(*LION, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*LION, signal_at(1, 1, signal.SIGINT), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")
