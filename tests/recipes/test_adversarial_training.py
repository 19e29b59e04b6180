import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn

from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch
from cifarnet.models import Normalize
from cifarnet.recipes.adversarial import Adversarial
from cifarnet.recipes.sam import SAM
from cifarnet.seeding import generator
from cifarnet.train import train
from conftest import assert_same_weights

SEED = 5


def one_batch(count: int = 16, mixed: bool = False) -> Batch:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=random)
    labels, partners = torch.randint(0, 5, (2, count), generator=random)
    mix = (partners, torch.rand(count, generator=random)) if mixed else ()
    return Batch(images, labels, torch.arange(count), *mix)


class Network(nn.Sequential):
    """A network with batch norm, dropout and a batch norm that stays in eval mode."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(6).eval()
        super().__init__(Normalize(), *layers, nn.Flatten(), nn.Linear(6 * 36, 5))
        self[2].running_mean.copy_(torch.randn(6) / 5)


def attack(network: nn.Module, batch: Batch, plugin=None, batch_idx: int = 0, **settings) -> Classifier:
    """Change a batch, as before the step `batch_idx` of epoch 2."""
    module = Classifier(network, partial(torch.optim.SGD, lr=1.0), seed=SEED)
    loader = SimpleNamespace(batch_size=len(batch.labels))
    trainer = SimpleNamespace(train_dataloader=loader, precision_plugin=plugin or Precision(), current_epoch=2)
    Adversarial(**settings).on_train_batch_start(trainer, module, batch, batch_idx)
    return module


def copied(batch: Batch) -> Batch:
    return batch._replace(images=batch.images.clone())


def losses(network: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return F.cross_entropy(copy.deepcopy(network).eval()(batch.images), batch.labels, reduction="none")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("eps", "steps", "step_size"), [(8, 1, 10), (8, 7, 2), (3, 4, 0.5)])
def test_images_equal_those_of_a_loop_over_single_images(mixed, eps, steps, step_size):
    network, batch = Network().train(), one_batch(mixed=mixed)
    changed = copied(batch)
    attack(network, changed, eps=eps, steps=steps, step_size=step_size)
    reference = copy.deepcopy(network).eval()
    noise = 2 * torch.rand(16, 3, 8, 8, generator=generator(SEED, 2, "adversarial 0")) - 1
    expected = []
    for i in range(16):
        clean = batch.images[i].float()
        pixels = clean + eps * noise[i]
        for _ in range(steps):
            pixels = torch.clamp(pixels.detach(), 0, 255).requires_grad_()
            scores = -reference(pixels[None] / 255).log_softmax(1)[0]
            loss = scores[batch.labels[i]]
            if mixed:
                loss = batch.lam[i] * loss + (1 - batch.lam[i]) * scores[batch.partners[i]]
            loss.backward()
            moved = pixels.detach() + step_size * pixels.grad / pixels.grad.abs().clamp_min(1e-30)
            pixels = torch.minimum(torch.maximum(moved, clean - eps), clean + eps)
        expected.append(pixels.clamp(0, 255).round())
    differs = changed.images != torch.stack(expected)
    assert differs.float().mean() < 1e-3  # where the gradient is zero, except for rounding
    distance = (changed.images.float() - batch.images.float()).abs()
    assert distance.max() <= eps
    assert losses(network, changed).mean() > losses(network, batch).mean()


def test_nothing_but_the_images_changes():
    network = Network()
    modes = [layer.training for layer in network.modules()]
    assert sorted(set(modes)) == [False, True]
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)
    gradients = [weight.grad.clone() for weight in network.parameters()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random, batch = torch.get_rng_state(), one_batch()
    changed = copied(batch)
    attack(network, changed)
    assert not torch.equal(changed.images, batch.images)
    assert changed.images.dtype == torch.uint8
    for weight, value in zip(network.parameters(), gradients, strict=True):
        assert torch.equal(weight.grad, value)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [layer.training for layer in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_draws_are_a_function_of_seed_epoch_and_batch():
    images = []
    for batch_idx in (0, 0, 1):
        batch = one_batch()
        attack(Network(), batch, batch_idx=batch_idx)
        images.append(batch.images)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_ranks_change_their_part_of_the_batch(monkeypatch):
    whole = one_batch()
    attack(Network(), whole)
    for rank, place in enumerate((slice(0, 8), slice(8, 16))):
        monkeypatch.setattr("cifarnet.recipes.adversarial.rank", lambda rank=rank: rank)
        monkeypatch.setattr("cifarnet.recipes.adversarial.world_size", lambda: 2)
        part = Batch(*(member[place] for member in one_batch()[:3]))
        trainer = SimpleNamespace(train_dataloader=SimpleNamespace(batch_size=16), precision_plugin=Precision())
        trainer.current_epoch = 2
        module = Classifier(Network(), partial(torch.optim.SGD, lr=1.0), seed=SEED)
        Adversarial().on_train_batch_start(trainer, module, part, 0)
        assert (part.images != whole.images[place]).float().mean() < 1e-3


class Confident(nn.Module):
    """Logits that are linear in the pixels; the last one is much larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 64, 5)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-0.04, 0.04, 5)[:, None].expand(5, 192))
            self.layer.bias.copy_(torch.linspace(0, 50, 5))

    def forward(self, images):
        return self.layer(images.flatten(1))


def test_small_gradients_do_not_vanish_in_float16():
    batch = one_batch()
    batch = batch._replace(images=torch.full_like(batch.images, 100), labels=torch.full_like(batch.labels, 4))
    assert 1e-7 < losses(Confident(), batch._replace(images=batch.images / 255)).max() < 2e-6
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    attack(Confident(), batch, scaled, steps=20)
    assert torch.equal(batch.images, torch.full_like(batch.images, 92))


class Watch(Callback):
    """Keeps the images of the second batch, after the recipes have changed them, and of the data set.

    At the first batch, the head of the network is zero, and so are the gradients.
    """

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            self.pixels = trainer.train_dataloader.pixels.clone()
            self.images = batch.images.clone()

    def on_train_batch_end(self, trainer, module, *_):
        for callback in trainer.callbacks:
            if isinstance(callback, SAM) and trainer.global_step == 2:
                self.used = callback.batch.images.clone()

    def on_train_end(self, trainer, module):
        self.unchanged = torch.equal(self.pixels, trainer.train_dataloader.pixels)


@pytest.mark.parametrize("settings", [["data.crop_padding=0", "data.flip=none"], ["+recipe=mixup"]])
def test_the_data_set_is_not_changed(config, settings):
    watches = []
    for recipe in ([], ["+recipe.a={_target_: cifarnet.recipes.adversarial.Adversarial}"]):
        watches.append(Watch())
        settings = [*settings, "scheduler=constant", "trainer.max_epochs=1"]
        train(config(*settings, *recipe, folder=f"run{len(recipe)}"), callbacks=watches[-1:])
    assert [watch.unchanged for watch in watches] == [True, True]
    distance = (watches[0].images.int() - watches[1].images.int()).abs()
    assert distance.max() == 8
    assert distance.float().mean() > 4


def test_sam_uses_the_changed_images(config):
    watch = Watch()
    train(config("+recipe=[sam,adversarial]", "scheduler=constant", "trainer.max_epochs=1"), callbacks=[watch])
    assert torch.equal(watch.used, watch.images)


@pytest.mark.parametrize(
    "settings",
    [
        ["+recipe=[adversarial,mixup]", "+trainer.accumulate_grad_batches=2"],
        ["+recipe=[adversarial,sam,ema]", "trainer.precision=bf16-mixed"],
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(resumed_run, settings):
    resumed_run(*settings, "recipe.adversarial.steps=2", "model.drop_rate=0.2", "optimizer.lr=0.02")


def test_streamed_images(config, tmp_path, few_photographs):
    settings = ["data=folder", f"data.root={few_photographs}", "data.batch_size=32", "data.workers=0"]
    settings += ["+recipe=adversarial", "recipe.adversarial.steps=1", "scheduler=constant", "trainer.max_epochs=1"]
    for in_memory in ("true", "false"):
        train(config(*settings, f"data.in_memory={in_memory}", folder=in_memory, without="data"))
    assert_same_weights(*(tmp_path / name / "checkpoints/last.ckpt" for name in ("true", "false")))


@pytest.mark.slow
def test_two_ranks_train_like_one(sharded_run):
    sharded_run("+recipe=adversarial", "recipe.adversarial.steps=2", "data.batch_size=17", "optimizer.lr=0.02")


@pytest.mark.slow  # unless the compiled code is cached
def test_a_compiled_network(config, tmp_path):
    settings = ["+recipe=adversarial", "scheduler=constant", "trainer.max_epochs=1"]
    watches = [Watch(), Watch()]
    for watch, compiled in zip(watches, ("false", "true"), strict=True):
        train(config(*settings, f"compile={compiled}", folder=compiled), callbacks=[watch])
    assert (watches[0].images != watches[1].images).float().mean() < 1e-2
