"""Measured steps and the learning-rate range test, against plain loops."""

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


def accumulation(factors):
    target = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    return f"+callbacks.accumulation={{_target_: {target}, scheduling: {factors}}}"


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
            lr = settings["lr"]
            optimizer.param_groups[0]["lr"] = lr * (rates[len(losses) // batches_per_step] / lr)
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
    rates, losses = range_test(run, RATES, SharedImages())  # 12 steps in 3 epochs
    assert rates == RATES
    assert losses == plain_losses(run, RATES)


@pytest.mark.parametrize("setting", ["+trainer.accumulate_grad_batches=2", accumulation("{0: 2}")])
def test_range_test_with_accumulation_equals_a_plain_loop(config, setting):
    run = config("optimizer=sgd", setting, "data.batch_size=45")  # two steps in an epoch
    rates, losses = range_test(run, RATES, SharedImages())
    assert rates == [rate for rate in RATES for _ in range(2)]
    assert losses == pytest.approx(plain_losses(run, RATES, batches_per_step=2), rel=1e-5)


BACKBONE = "+recipe.backbone={_target_: cifarnet.recipes.backbone.Backbone, lr_scale: %s}"
MUON = ["optimizer=muon", "optimizer.lr=0.1", "optimizer.bias.lr=0.3"]


@pytest.mark.parametrize(
    ("overrides", "ratios"),
    [
        ([*MUON, "model=speednet", "model.widths=[8,8,8]"], [1, 3, 1]),
        ([BACKBONE % 0.1], [0.1, 1]),
        ([BACKBONE % 0], [0, 1]),
        (["+recipe=no_decay", "+module.scheduler_interval=epoch"], [1, 1]),
    ],
)
def test_groups_keep_their_ratio_to_the_setting(config, monkeypatch, overrides, ratios):
    seen = []

    def note(self, trainer, module, optimizer):
        seen.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(Steps, "on_before_optimizer_step", note)
    range_test(config(*overrides, without="model." if MUON[0] in overrides else "-"), RATES, SharedImages())
    assert np.array(seen) == pytest.approx(np.outer(RATES, ratios))


def test_a_range_test_continues_after_a_divergence(config):
    rates = [1e9] * 10
    assert range_test(config("callbacks.nan=null"), rates, SharedImages())[0] == rates


RISING = np.geomspace(1e-4, 1, 101)


def test_suggestion_is_the_rate_of_the_lowest_loss():
    logs = np.log10(RISING)
    noise = np.random.default_rng(0).normal(0, 0.05, 101)
    text, _ = suggest(RISING, 2 + (logs + 1.5) ** 2 / 4 + noise, lr=0.01)  # lowest at 10^-1.5
    found, factor = map(float, re.findall(r"lr=([\d.e-]+), .* × ([\d.]+)\)", text)[0])
    assert math.log10(found) == pytest.approx(-1.5, abs=0.3)
    assert factor == pytest.approx(found / 0.01, rel=0.05)
    text, _ = suggest(RISING, [*2 - (logs[:60] + 4) / 4, *[1e9] * 41], lr=0.01)  # diverges after 60 steps
    assert float(re.findall(r"lr=([\d.e-]+),", text)[0]) < RISING[60]


@pytest.mark.parametrize(
    ("losses", "reason", "remedy"),
    [
        (2 + np.random.default_rng(0).normal(0, 0.1, 101), "noise", "Raise lr_steps, or change lr_min and lr_max."),
        (2 + np.random.default_rng(0).normal(0, np.geomspace(1e-4, 0.1, 101)), "noise", "Raise lr_steps"),
        (2 - np.arange(101) / 100, "still falling at lr_max=1", "Raise lr_max."),
        ([1e9], "noise", "Raise lr_steps"),
    ],
)
def test_there_is_no_suggestion_without_a_lowest_loss(losses, reason, remedy):
    text, _ = suggest(RISING[: len(losses)], losses, lr=0.01)
    assert text.startswith("none")
    assert reason in text
    assert remedy in text


def test_ten_steps_are_measured_and_nothing_is_written(config, tmp_path):
    run = config("data.train_size=800", "+recipe=ema")  # 22 steps in an epoch
    built = build_steps(run, steps := Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    assert built.trainer.global_step == len(steps.seconds) == 13
    assert built.classifier.total_steps == 44  # the schedule is that of the whole run
    assert steps.memory > 2**20
    assert not list((tmp_path / "run").rglob("*"))


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], None),
        ([], [16, 24]),
        ([], [16, 16, 16]),
        (["+trainer.max_steps=7"], None),
        ([accumulation("{0: 3, 2: 1}")], None),
        ([accumulation("{0: 3, 2: 1}"), "+trainer.max_steps=7"], [16, 24]),
    ],
)
def test_seconds_are_those_of_all_batches(config, overrides, sizes):
    run = config("trainer.max_epochs=4", *overrides)
    built = build_steps(run, steps := Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    steps.seconds = [9.0, 9.0, 9.0, 1.0, 2.0, 3.0]
    text = costs(built, steps, sizes)
    accumulates, most = overrides[:1] == [accumulation("{0: 3, 2: 1}")], run.trainer.get("max_steps", math.inf)
    count, expected = 0, 0.0
    for epoch in range(4):  # of five batches
        size, per_step = sizes[min(epoch, len(sizes) - 1)] if sizes else 32, 3 if accumulates and epoch < 2 else 1
        for batch in range(5):
            if count < most:
                expected += 2.0 * size**2 / 32**2
                count += (batch + 1) % per_step == 0 or batch == 4
    assert text["epoch"] == f"{2 if accumulates else 5} steps, 5 batches of 32 images"
    assert "2.0000 s per batch, 16 images/s (median, n = 3)" in text["speed"]
    assert text["training"].startswith(f"about {expected:,.0f} s for {count} steps")


class Rates(Callback):
    """Records the learning rates of a run."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize(
    "schedule", [["scheduler=onecycle"], ["scheduler=step"], ["+recipe=no_decay"], [accumulation("{0: 2, 1: 1}")]]
)
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
    assert lines[0].get_xdata().tolist() == list(range(len(seen.rates)))


def test_a_schedule_that_counts_epochs_is_drawn_by_epoch(config):
    settings = ["scheduler=cosine", "+module.scheduler_interval=epoch", "trainer.max_epochs=4"]
    built = build_steps(config(*settings), Steps(), SharedImages())
    built.trainer.fit(built.classifier, datamodule=built.data)
    [line] = draw_schedule(built).axes[0].lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3]
    assert line.get_ydata() == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)])


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


@pytest.mark.parametrize("epochs", [1, -1])
def test_a_single_epoch_is_drawn_once(config, epochs):
    built = build_steps(config(f"trainer.max_epochs={epochs}", "scheduler=constant"), Steps(), SharedImages())
    [axis] = draw_images(built).axes
    assert len(axis.images) == 24
    assert "Augmented training images of epoch 1" in [text.get_text() for text in axis.texts]
