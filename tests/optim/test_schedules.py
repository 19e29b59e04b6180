import math
import re
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler

from cifarnet.config import validate
from cifarnet.errors import Interrupted, UserError
from cifarnet.optim.schedules import Steps, WarmupCosine, warnings_about
from cifarnet.records.record import Record
from cifarnet.resuming import resume
from cifarnet.train import train
from cifarnet.trainer import make_scheduler
from conftest import SignalAt, assert_same_weights, small


def rates(steps, make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule, seen = make(optimizer, steps), []
    for _ in range(steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_rates_equal_those_by_hand():
    half = 2**0.5 / 2
    cosine = [1, 2, 2, 1 + half, 1, 1 - half, 0]  # 2 of 6 steps of warm-up, then cos 0, π/4, π/2, …
    assert rates(6, lambda *made: WarmupCosine(*made, warmup=1 / 3)) == pytest.approx(cosine)
    assert rates(4, lambda *made: WarmupCosine(*made, warmup=0)) == pytest.approx([2, 1 + half, 1, 1 - half, 0])
    assert rates(4, lambda optimizer, _: WarmupCosine(optimizer, 2, warmup=0)) == pytest.approx([2, 1, 0, 0, 0])
    assert rates(1, WarmupCosine) == pytest.approx([2, 0])
    assert rates(4, Steps) == pytest.approx([2, 2, 0.2, 0.02, 0.02])
    assert rates(4, lambda *made: Steps(*made, milestones=[0.25], gamma=0.5)) == pytest.approx([2, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler=warmup_cosine", "scheduler.warmup=5"],
        ["scheduler=step", "scheduler.milestones=[30, 40]"],
        ["scheduler=step", "scheduler.gamma=0"],
    ],
)
def test_settings_out_of_range_are_refused(config, overrides):
    with pytest.raises(UserError) as error:
        validate(config(*overrides))
    assert str(error.value).startswith(overrides[1])


EPOCH = "+module.scheduler_interval=epoch"
TORCH = "torch.optim.lr_scheduler."


def factor(epoch):
    return 0.9**epoch


FACTOR = {"_target_": "test_schedules.factor", "_partial_": True}
NESTED = [{"_target_": f"{TORCH}LinearLR", "total_iters": 2}, {"_target_": f"{TORCH}ExponentialLR", "gamma": 0.8}]
SETTINGS = {  # whose unit is one epoch of four
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"total_iters": 2},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.7},
    "PolynomialLR": {"total_iters": 4, "power": 2},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 4},
    "LambdaLR": {"lr_lambda": FACTOR},
    "MultiplicativeLR": {"lr_lambda": FACTOR},
    "SequentialLR": {"schedulers": NESTED, "milestones": [2]},
    "ChainedScheduler": {"schedulers": NESTED},
    "ReduceLROnPlateau": {"patience": 0, "mode": "max", "factor": 0.5},
}


def by_hand(name, settings, optimizer):
    """Build a schedule of torch without Hydra."""
    settings = settings | ({"lr_lambda": factor} if "lr_lambda" in settings else {})
    if "schedulers" in settings:
        linear, exponential = NESTED
        first = lr_scheduler.LinearLR(optimizer, total_iters=linear["total_iters"])
        settings = settings | {"schedulers": [first, lr_scheduler.ExponentialLR(optimizer, exponential["gamma"])]}
    return getattr(lr_scheduler, name)(optimizer=optimizer, **settings)


@pytest.fixture
def scheduled(config):
    def compose(name, *overrides, **settings):
        made = config("data.train_size=80", "trainer.max_epochs=4", "callbacks.pictures=null", "~logger", *overrides)
        made.scheduler = {"_target_": f"{TORCH}{name}", **settings}
        return made

    return compose


@pytest.mark.parametrize("name", sorted(set(lr_scheduler.__all__) - {"LRScheduler"}))
def test_schedules_of_torch_count_epochs(scheduled, tmp_path, name):
    """Compare the learning rates of a run that was stopped after epoch 2 and resumed with those of a plain loop."""
    with pytest.raises(Interrupted):
        train(scheduled(name, EPOCH, **SETTINGS[name]), callbacks=[SignalAt(1, 1, signal.SIGTERM)])
    train(*resume(tmp_path / "run", ["classes=[test_schedules.factor]"]))
    history = Record.read(tmp_path / "run/metrics.json").history
    optimizer, rates = torch.optim.SGD([torch.zeros(1)], lr=0.05, momentum=0.9), []
    schedule = by_hand(name, SETTINGS[name], optimizer)
    for row in history:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*[row["val/accuracy"]] * (name == "ReduceLROnPlateau"))
    assert [row["learning_rate"] for row in history] == rates
    assert len(set(rates)) > 1


@pytest.mark.parametrize("stop", [(0, 1), (1, 0)])
def test_a_resumed_plateau_matches_an_uninterrupted_one(scheduled, tmp_path, stop):
    made = scheduled("ReduceLROnPlateau", **SETTINGS["ReduceLROnPlateau"])
    train(made)
    made.output_dir = str(tmp_path / "parts")
    with pytest.raises(Interrupted):
        train(made, callbacks=[SignalAt(*stop, signal.SIGTERM)])
    train(*resume(tmp_path / "parts"))
    assert_same_weights(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")
    whole, parts = (Record.read(tmp_path / name / "metrics.json") for name in ("run", "parts"))
    assert whole.history == parts.history


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("MultiStepLR", {"milestones": [1, 40]}, r"milestones \[40\] are never reached.*8 steps"),
        ("MultiStepLR", {"milestones": [-1, 2]}, r"milestones \[-1\]"),
        ("MultiStepLR", {"milestones": [1]}, "not change after step 1 of 8, in the first epoch.*scheduler_interval"),
        ("StepLR", {"step_size": 30}, "never changes within the 8 steps"),
    ],
)
def test_a_schedule_that_hardly_changes_the_rate_is_reported(scheduled, capsys, name, settings, message):
    train(scheduled(name, **settings))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scheduler: ")]
    assert re.search(message, printed[0])


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "onecycle", "step", "warmup_cosine"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_usual_schedules_are_not_reported(interval, name):
    config = small(f"scheduler={name}", "output_dir=.")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert not list(warnings_about(make_scheduler(config, True), optimizer, 40, 5, interval))


def test_a_schedule_that_fails_in_a_later_epoch_is_refused_at_the_start(scheduled):
    with pytest.raises(UserError, match=r"^scheduler: step 4 failed"):
        train(scheduled("OneCycleLR", max_lr=0.1, total_steps=3))


def test_a_plateau_needs_validation(scheduled):
    with pytest.raises(UserError, match=r"ReduceLROnPlateau.*data\.val_fraction"):
        train(scheduled("ReduceLROnPlateau", "data.val_fraction=0"))


def test_the_rate_of_an_epoch_is_that_of_its_last_step(config, tmp_path):
    """The cosine of torch's documentation, after four of five steps; the fifth one ends the epoch with a rate of 0."""
    train(config("scheduler=cosine", "trainer.max_epochs=1"))
    (row,) = Record.read(tmp_path / "run/metrics.json").history
    assert row["learning_rate"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 4 / 5)) / 2)
    curves = EventAccumulator(str(tmp_path / "run")).Reload()
    assert curves.Scalars("train/learning_rate")[0].value == pytest.approx(row["learning_rate"])
