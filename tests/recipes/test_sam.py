import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn
from torch.utils.data import DataLoader

from cifarnet import classifier
from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch
from cifarnet.errors import Interrupted, UserError
from cifarnet.recipes import sam
from cifarnet.recipes.sam import SAM
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, SMALL, assert_same_weights, signal_at, weights
from test_classifier import quiet_trainer

RHO = 0.7


class Norms(nn.Module):
    """A linear network with batch norm and one frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 10), nn.Linear(10, 10)).double()
        self.layers[3].requires_grad_(False)

    def forward(self, images):
        return self.layers(images)


def one_batch() -> Batch:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 2, 2, dtype=torch.double, generator=random)
    return Batch(images, torch.randint(0, 10, (16,), generator=random), torch.arange(16))


def fitted(network: nn.Module, *callbacks: Callback, epochs: int = 1, lr: float = 1.0, **settings) -> Classifier:
    """Train with one step of gradient descent per epoch."""
    module = Classifier(network, partial(torch.optim.SGD, lr=lr))
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks], **settings)
    trainer.fit(module, DataLoader([one_batch()], batch_size=None))
    return module


def test_a_step_equals_one_by_hand():
    """Compare with the gradient at w + ρ g / ‖g‖ of the loss as a function of the weights."""
    torch.manual_seed(0)
    network = Norms()
    images, labels, *_ = one_batch()
    initial = {name: value.detach().clone() for name, value in network.named_parameters()}
    names = [name for name, value in network.named_parameters() if value.requires_grad]

    def loss(learned: dict) -> torch.Tensor:
        x = images.flatten(1)
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * learned["layers.1.weight"]
        x = (x + learned["layers.1.bias"]) @ learned["layers.2.weight"].T + learned["layers.2.bias"]
        return F.cross_entropy(x @ initial["layers.3.weight"].T + initial["layers.3.bias"], labels)

    learned = {name: initial[name] for name in names}
    first = torch.func.grad(loss)(learned)
    norm = sum(gradient.square().sum() for gradient in first.values()).sqrt()
    second = torch.func.grad(loss)({name: learned[name] + RHO * first[name] / norm for name in names})
    assert max((first[name] - second[name]).abs().max() for name in names) > 1e-3

    fitted(network, SAM(RHO))
    for name, value in network.named_parameters():
        torch.testing.assert_close(value, initial[name] - second.get(name, 0))


def test_metrics_and_statistics_are_those_of_the_first_forward_pass():
    modules = []
    for callbacks in ([], [SAM(RHO)]):
        torch.manual_seed(0)
        modules.append(fitted(Norms(), *callbacks))
    plain, climbed = modules
    assert climbed.means("train") == plain.means("train")
    for one, other in zip(plain.network.buffers(), climbed.network.buffers(), strict=True):
        assert torch.equal(one, other)
    assert plain.network.layers[1].num_batches_tracked == 1
    assert not torch.equal(plain.network.layers[2].weight, climbed.network.layers[2].weight)


def test_weights_are_restored_bit_by_bit():
    """With a learning rate of 0, a step does not change the weights."""
    torch.manual_seed(0)
    network = Norms()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fitted(network, SAM(RHO), epochs=3, lr=0.0)
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name]), name


def ascent(network: nn.Module, batch: Batch, gradient: list[torch.Tensor], batch_size: int) -> list[torch.Tensor]:
    """Return the gradients by which SAM steps on one rank, whose gradient at w is `gradient`."""
    module = Classifier(network, partial(torch.optim.SGD, lr=1.0))
    module._trainer = SimpleNamespace(
        train_dataloader=SimpleNamespace(batch_size=batch_size), precision_plugin=Precision()
    )
    for weight, value in zip(module.parameters(), gradient, strict=False):
        weight.grad = value.clone()
    if not gradient:
        module.forward_and_loss(batch)[1].mean().backward()
        gradient += [weight.grad.clone() for weight in module.parameters()]
    recipe = SAM(RHO)
    recipe.batch = batch
    recipe.on_before_optimizer_step(module.trainer, module, None)
    return [weight.grad for weight in module.parameters()]


def test_ranks_step_with_the_mean_gradient_of_the_whole_batch(monkeypatch):
    """Two threads are two ranks with 9 and 7 images; DDP has averaged the gradient at w."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).double()]
    networks += [deepcopy(networks[0]) for _ in range(2)]
    batch, gradient = one_batch(), []
    expected = ascent(networks[0], batch, gradient, 16)
    monkeypatch.setattr(sam, "world_size", lambda: 2)
    monkeypatch.setattr(classifier, "world_size", lambda: 2)
    barrier, sent = threading.Barrier(2, timeout=60), []

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.clone())
        barrier.wait()
        tensor.copy_(sum(sent))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    parts = [Batch(*(member[place] for member in batch[:3])) for place in (slice(0, 9), slice(9, 16))]
    with ThreadPoolExecutor(2) as ranks:
        made = list(ranks.map(lambda network, part: ascent(network, part, list(gradient), 16), networks[1:], parts))
    for rank in made:
        for one, other in zip(rank, expected, strict=True):
            torch.testing.assert_close(one, other)


class Norm(Callback):
    """Records the norm of the gradients by which the optimizer steps."""

    def __init__(self) -> None:
        self.norms = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        self.norms += [torch.nn.utils.get_total_norm(gradients).item()] if gradients else []


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.precision=bf16-mixed", "+recipe=[sam,clip,mixup]"],
        ["optimizer=muon", "+recipe=[sam,clip,ema]", "data.hardest_share=0.7"],
        ["optimizer=adamw", "+recipe=[sam,clip,lookahead]"],
        [
            "+recipe=[sam,clip]",
            "+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: features, epoch: 2}",
        ],
    ],
    ids=lambda settings: settings[0],
)
def test_gradients_are_clipped_after_the_second_backward_pass(config, settings):
    norm = Norm()
    train(config(*settings, "trainer.gradient_clip_val=0.01", "recipe.sam.rho=1"), callbacks=[norm])
    assert norm.norms == pytest.approx([0.01] * len(norm.norms), rel=1e-3)
    assert len(norm.norms) >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["+trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2"),
        (
            ["+callbacks.x={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 3}}"],
            "trainer.accumulate_grad_batches=3",
        ),
    ],
)
def test_accumulated_gradients_are_refused_in_one_line(command, settings, message):
    status, _, error = command(*SMALL, "+recipe=sam", *settings)
    assert (status, error.count("\n")) == (1, 1), error
    assert message in error


def test_scaled_gradients_are_refused():
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match=r"precision=16-mixed.*bf16-mixed"):
        fitted(Norms(), SAM(RHO), plugins=[scaled])


def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path):
    settings = ["+recipe=sam", "model.drop_rate=0.2", "optimizer.lr=0.02"]
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*settings, signal_at(1, 2, signal.SIGINT), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]


@pytest.mark.slow  # unless the compiled code is cached
def test_a_compiled_network_takes_the_same_steps():
    networks = []
    for compiled in (False, True):
        torch.manual_seed(0)
        networks.append(Norms())
        if compiled:
            networks[-1].compile()
        fitted(networks[-1], SAM(RHO), epochs=3)
    for (name, one), other in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.slow
def test_two_ranks_train_like_one(config, tmp_path):
    """The ranks get 9 and 8 images of a batch."""
    settings = ["+recipe=sam", "recipe.sam.rho=0.5", "data.batch_size=17", "optimizer.lr=0.05"]
    train(config("threads=1", *settings, folder="one"))
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    train(config(*settings, *two, folder="two", without="trainer=cpu"))
    one, other = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
