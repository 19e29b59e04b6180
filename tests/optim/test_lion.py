"""A library's optimizer, with a list among its settings."""

import signal

import pytest

from cifarnet.errors import Interrupted
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import OWN, assert_same_weights, signal_at

LION = ["optimizer=lion", "optimizer.betas=[0.9,0.98]", "scheduler=linear", "trainer.max_epochs=2"]


def test_lion_resumed_equals_lion_never_stopped(config, tmp_path):
    train(config(*LION, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*LION, signal_at(1, 1, signal.SIGINT), folder="parts"))
    train(*resume(tmp_path / "parts", [OWN]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")
