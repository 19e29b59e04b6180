"""Recipes that only change settings."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import UserError
from cifarnet.train import train


class Watch(Callback):
    """Records the optimizer's parameter groups, and the norm of the gradients by which it steps."""

    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.groups = optimizer.param_groups
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if gradients:
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())


def test_no_decay_applies_to_parameters_with_one_dimension(config):
    watch = Watch()
    train(config("+recipe=no_decay", "trainer.max_epochs=1", "scheduler=linear"), callbacks=[watch])
    decayed, others = watch.groups
    assert {parameter.ndim for parameter in decayed["params"]} == {2, 4}
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-3, 0)
    assert decayed["lr"] == others["lr"]


def test_muon_refuses_parameter_groups(config):
    with pytest.raises(UserError, match=r"optimizer: .*parameter groups.*optimizer=sgd"):
        train(config("+recipe=no_decay", "optimizer=muon"))


def test_gradients_are_clipped(config):
    watch = Watch()
    train(
        config("+recipe=clip", "trainer.gradient_clip_val=0.01", "trainer.max_epochs=1", "scheduler=linear"),
        callbacks=[watch],
    )
    assert watch.norms == pytest.approx([0.01] * len(watch.norms), rel=1e-3)
    assert len(watch.norms) >= 4
