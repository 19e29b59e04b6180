"""Accumulated gradients, compared with a plain PyTorch loop."""

import itertools
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F

from cifarnet.build import build
from cifarnet.errors import Interrupted
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at, weights

PLAIN = ["scheduler=constant", "optimizer.nesterov=false"]  # five batches an epoch


def scheduled(factors: str) -> str:
    target = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    return f"+callbacks.scheduled={{_target_: {target}, scheduling: {factors}}}"


def plain_loop(config, sizes: list[int]) -> dict[str, torch.Tensor]:
    """Train for one epoch for each size; a step uses the mean gradient of `size` batches, or of those that are left."""
    _, classifier, data, _ = build(config)
    network, loader = classifier.network.train(), data.train_dataloader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for epoch, size in enumerate(sizes):
        loader.set_epoch(epoch)
        batches = iter(loader)
        while window := list(itertools.islice(batches, size)):
            optimizer.zero_grad()
            for batch in window:
                (F.cross_entropy(network(batch.images), batch.labels) / len(window)).backward()
            optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize(
    ("setting", "sizes"),
    [
        ("+trainer.accumulate_grad_batches=2", [2, 2]),  # the last step of an epoch has one batch
        ("+trainer.accumulate_grad_batches=20", [20, 20]),  # more than an epoch has
        (scheduled("{0: 3, 1: 2}"), [3, 2]),
    ],
)
def test_a_step_uses_the_mean_over_its_batches(config, tmp_path, setting, sizes):
    train(config(*PLAIN, setting))
    expected = plain_loop(config(*PLAIN), sizes)
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == sum(math.ceil(5 / size) for size in sizes)
    for name, value in expected.items():
        torch.testing.assert_close(weights(last)[f"network.{name}"], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ([scheduled("{0: 1, 1: 2, 4: 4}"), "trainer.max_epochs=6"], 5 + 3 + 3 + 3 + 2 + 2),
        ([scheduled("{1: 3}"), "trainer.max_epochs=3", "+trainer.max_steps=8"], 8),
        ([scheduled("{1: 3}"), "trainer.max_epochs=3", "+trainer.limit_train_batches=4"], 4 + 2 + 2),
    ],
)
def test_the_schedule_ends_with_the_last_step(config, settings, steps):
    built = build(config("scheduler=linear", *settings))
    built.trainer.fit(built.classifier, datamodule=built.data)
    assert built.classifier.total_steps == built.trainer.global_step == steps
    assert built.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


TWO, THREE = (f"+trainer.accumulate_grad_batches={size}" for size in (2, 3))


@pytest.mark.parametrize(
    ("settings", "moment", "steps"),
    [
        ([TWO], (0, 1), 1),  # the run stops after the next batch, the third one
        ([TWO, "+recipe=ema", "+trainer.val_check_interval=1"], (1, 1), 4),
        ([THREE, "+trainer.gradient_clip_val=0.1"], (0, 0), 0),
        ([THREE], (1, 2), 3),  # before the last two batches of the epoch
        ([scheduled("{0: 1, 1: 3}")], (1, 0), 5),
    ],
)
def test_a_run_that_stops_between_two_steps_can_be_resumed(config, tmp_path, settings, moment, steps):
    whole, parts = tmp_path / "whole/checkpoints", tmp_path / "parts/checkpoints"
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*settings, signal_at(*moment, signal.SIGTERM), folder="parts"))
    assert torch.load(parts / "last.ckpt", weights_only=True)["global_step"] == steps
    train(*resume(parts.parent, [ALLOW_SIGNAL]))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(whole / name, parts / name)


def test_a_validation_that_is_due_after_the_last_batch_is_not_left_out(config, tmp_path):
    setting = "+trainer.val_check_interval=3"
    train(config(setting, folder="whole"))
    with pytest.raises(Interrupted, match="after batch 3"):
        train(config(setting, signal_at(0, 1, signal.SIGTERM), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert [row["step"] for row in whole["within_epochs"]] == [3, 8]
    assert whole["within_epochs"] == parts["within_epochs"]
