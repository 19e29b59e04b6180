"""Measured steps and the learning-rate range test, against plain loops."""

import copy
import math
import re

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torchvision.transforms.functional import to_pil_image

from cifarnet.build import make_data, make_network
from cifarnet.data.shared_images import SharedImages
from cifarnet.inspection.images import draw_images, labels
from cifarnet.inspection.steps import Steps, build_steps, costs, draw_schedule, range_test, suggest
from cifarnet.seeding import derive
from cifarnet.train import train

RATES = np.geomspace(0.01, 1, 12).tolist()


def plain_losses(config, rates, batches_per_step=1):
    """Return the losses of a range test in plain PyTorch."""
    L.seed_everything(config.seed, verbose=False)
    data = make_data(config)
    network, _ = make_network(config, data)
    network = network.to(memory_format=torch.channels_last).train()
    settings = {key: value for key, value in config.optimizer.items() if key != "_target_"}
    optimizer = torch.optim.SGD(network.parameters(), **settings)
    loader, losses, epoch = data.train_dataloader(), [], 0
    while True:
        loader.set_epoch(epoch)
        torch.manual_seed(derive(config.seed, epoch, "torch"))
        for number, batch in enumerate(loader):
            optimizer.param_groups[0]["lr"] = rates[len(losses) // batches_per_step]
            images = batch.images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(images), batch.labels, reduction="none").mean()
            size = batches_per_step if number < len(loader) // batches_per_step * batches_per_step else 1
            (loss / size).backward()
            losses.append(loss.item())
            if (number + 1) % batches_per_step == 0 or number + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()
            if len(losses) == len(rates) * batches_per_step:
                return losses
        epoch += 1


def test_range_test_equals_a_plain_loop(config):
    run = config("optimizer=sgd", "threads=1")
    test = range_test(run, RATES, SharedImages())  # 12 steps in 3 epochs
    assert test.rates == RATES
    assert test.losses == plain_losses(run, RATES)


def test_range_test_with_accumulation_equals_a_plain_loop(config):
    run = config("optimizer=sgd", "+trainer.accumulate_grad_batches=2", "data.batch_size=45")  # two steps in an epoch
    test = range_test(run, RATES, SharedImages())
    assert test.rates == [rate for rate in RATES for _ in range(2)]
    assert test.losses == pytest.approx(plain_losses(run, RATES, batches_per_step=2), rel=1e-5)


def test_groups_keep_their_ratio(config):
    run = config(
        "optimizer=muon",
        "optimizer.lr=0.1",
        "optimizer.bias.lr=0.3",
        "model=speednet",
        "model.widths=[8,8,8]",
        without="model.",
    )
    built = build_steps(run, steps := Steps(RATES), SharedImages(), max_epochs=-1, max_steps=len(RATES))
    built.trainer.fit(built.classifier, datamodule=built.data)
    groups = built.trainer.optimizers[0].param_groups
    assert steps.rates == RATES
    assert groups[0]["lr"] == RATES[-1]
    assert groups[1]["lr"] / groups[0]["lr"] == pytest.approx(3)


def made_up(losses):
    test = Steps(np.geomspace(1e-4, 1, len(losses)).tolist())
    test.rates, test.losses = list(test.planned_rates), list(losses)
    return test


def test_suggestion_is_the_rate_of_the_lowest_loss():
    logs = np.linspace(-4, 0, 101)
    noise = np.random.default_rng(0).normal(0, 0.05, 101)
    text, _ = suggest(made_up(2 + (logs + 1.5) ** 2 / 4 + noise))  # lowest at 10^-1.5
    assert math.log10(float(re.findall(r"lr=([\d.e-]+),", text)[0])) == pytest.approx(-1.5, abs=0.3)
    text, _ = suggest(made_up([*2 - (logs[:60] + 4) / 4, *[1e9] * 41]))  # diverges after 60 steps
    assert float(re.findall(r"lr=([\d.e-]+),", text)[0]) < 10 ** logs[60]


@pytest.mark.parametrize("losses", [2 + np.random.default_rng(0).normal(0, 0.1, 100), 2 - np.arange(100) / 100, [1e9]])
def test_there_is_no_suggestion_without_a_lowest_loss(losses):
    text, _ = suggest(made_up(losses))
    assert text.startswith("none")
    assert "lr_max" in text


def test_ten_steps_are_measured_and_nothing_is_written(config, tmp_path):
    run = config("data.train_size=800", "+recipe=ema")  # 22 steps in an epoch
    built = build_steps(run, steps := Steps(), SharedImages())
    before = copy.deepcopy(built.classifier.total_steps)
    built.trainer.fit(built.classifier, datamodule=built.data)
    assert before == 0
    assert built.trainer.global_step == len(steps.seconds) == 13
    assert built.classifier.total_steps == 44  # the schedule is that of the whole run
    assert steps.memory > 2**20
    assert not list((tmp_path / "run").rglob("*"))


@pytest.mark.parametrize("sizes", [None, [16, 24], [16, 16, 16]])
def test_seconds_are_those_of_all_epochs(config, sizes):
    run = config("trainer.max_epochs=4")
    built = build_steps(run, steps := Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    steps.seconds = [9.0, 9.0, 9.0, 1.0, 2.0, 3.0]
    text = costs(built, steps, sizes)
    assert text["epoch"] == "5 steps, 5 batches of 32 images"
    assert "2.0000 s per batch, 16 images/s (median of 3 batches)" in text["speed"]
    used = [sizes[min(epoch, len(sizes) - 1)] if sizes else 32 for epoch in range(4)]
    expected = sum(5 * 2.0 * size**2 / 32**2 for size in used)
    assert text["training"].startswith(f"about {expected:,.0f} s for 20 steps")


class Rates(Callback):
    """Records the learning rates of a run."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("schedule", [["scheduler=onecycle"], ["scheduler=step"], ["+recipe=no_decay"]])
def test_drawn_rates_are_those_of_the_run(config, schedule):
    seen = Rates()
    train(config(*schedule, folder="trained"), callbacks=[seen])
    built = build_steps(config(*schedule), Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    lines = draw_schedule(built).axes[0].lines
    drawn = np.array([line.get_ydata() for line in lines]).T
    expected = np.array(seen.rates)
    assert drawn == pytest.approx(expected / expected.max(0) if len(lines) > 1 else expected)
    assert f"{expected.max():.3g}" in lines[0].get_label()
    assert lines[0].get_xdata() == pytest.approx(np.arange(10) / 5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_epochs=-1", "scheduler=constant"],
        ["~scheduler", "+scheduler={_target_: torch.optim.lr_scheduler.ReduceLROnPlateau}"],
        ["~scheduler", "~logger", "~callbacks"],
    ],
)
def test_schedules_without_a_plan_are_drawn_as_constant(config, overrides):
    built = build_steps(config(*overrides), Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    rates = draw_schedule(built).axes[0].lines[0].get_ydata()
    assert set(rates) == {built.classifier.configure_optimizers()["optimizer"].param_groups[0]["lr"]}


def test_picture_shows_the_batches_of_the_run(config):
    run = config("+recipe=mixup")
    built = build_steps(run, Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    figure = draw_images(built)
    loader = make_data(run).train_dataloader()
    shown, names = [], built.data.class_names
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batch = next(iter(loader))
        shown += [np.array(to_pil_image(image)) for image in batch.images[:24]]
    drawn = [np.array(image.get_array()) for image in figure.axes[0].images]
    assert len(drawn) == 48
    assert all((one == other).all() for one, other in zip(drawn, shown, strict=True))
    caption = labels(batch, names)[3]
    weight, label = batch.lam[3].item(), names[batch.labels[3]]
    assert caption == f"{weight:.0%} {label}\n{1 - weight:.0%} {names[batch.partners[3]]}"
    assert caption in [text.get_text() for text in figure.axes[0].texts]
