"""Learning-rate schedules whose phases are fractions of a run, and a check of any schedule before training."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, ReduceLROnPlateau

from cifarnet.errors import UserError
from cifarnet.schema import Range

Interval = Literal["step", "epoch"]
Rates = list[list[float]]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]  # the integer is the number of steps of the whole run

MOST_STEPS = 10_000  # of a longer run, only these are checked; they take 0.1 seconds
Fraction = Annotated[float, Range(0, 1)]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter, 2016, https://arxiv.org/abs/1608.03983;
    warm-up: Goyal et al., 2017, https://arxiv.org/abs/1706.02677).

    Args:
        total_steps: the number of steps of the whole run.
        warmup: the fraction of the steps during which the rate rises.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: Fraction = 0.05) -> None:
        warmup_steps = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

        super().__init__(optimizer, factor)


class Steps(LambdaLR):
    """Multiply the learning rate by `gamma` at each milestone (He et al., 2015, https://arxiv.org/abs/1512.03385).

    Args:
        total_steps: the number of steps of the whole run.
        milestones: the milestones as fractions of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[Fraction] = (0.5, 0.75),
        gamma: Annotated[float, Range(above=0)] = 0.1,
    ) -> None:
        steps = [round(part * total_steps) for part in milestones]
        super().__init__(optimizer, lambda step: gamma ** sum(step >= at for at in steps))


def batches_per_step(trainer: L.Trainer, epoch: int) -> int:
    """Return the number of batches whose gradients an optimizer step uses in an epoch (from 0)."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def planned_steps(trainer: L.Trainer, interval: Interval) -> tuple[float, int]:
    """Return how often a run steps its schedule, infinite if the run has no end, and how often in the first epoch.

    The last step of an epoch may use fewer batches. (Lightning's estimate ignores GradientAccumulationScheduler.)
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches, epochs, max_steps = trainer.num_training_batches, trainer.max_epochs or -1, trainer.max_steps
    if batches == math.inf:  # trainer.limit_train_batches=0
        return 0, 0
    steps = [math.ceil(batches / batches_per_step(trainer, epoch)) for epoch in range(max(1, epochs))]
    total = min(math.inf if epochs < 0 else sum(steps), math.inf if max_steps < 0 else max_steps)
    if interval == "step" or not 0 < total < math.inf:
        return total, steps[0]
    return epochs if max_steps < 0 else math.ceil(total / steps[0]), 1


def learning_rates(make: MakeSchedule, optimizer: Optimizer, total: int, count: int) -> tuple[LRScheduler, Rates]:
    """Make a schedule for a copy of an optimizer with its initial learning rates, and step it.

    Args:
        optimizer: the run's optimizer, which is not changed.
        total: the number of times that the run steps the schedule.
        count: the number of steps to make. ReduceLROnPlateau, which needs validations, is not stepped.

    Returns:
        The schedule, and for each step the learning rates of the parameter groups before it.

    Raises:
        UserError: a step fails.
    """
    weights = [torch.zeros(1)]
    groups: list[dict[str, Any]] = [copy.deepcopy(group | {"params": weights}) for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group.pop("initial_lr", group["lr"])
    schedule, rates = make(Optimizer(groups, optimizer.defaults), total), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer makes no steps
        for step in range(count):
            rates.append([float(group["lr"]) for group in groups])
            if isinstance(schedule, ReduceLROnPlateau):
                continue
            try:
                schedule.step()
            except (ValueError, ArithmeticError) as error:
                raise UserError(f"scheduler: step {step + 1} failed: {error}. Change its settings.") from error
    return schedule, rates


def warnings_about(make: MakeSchedule, optimizer: Optimizer, total: int, first: int, unit: Interval) -> Iterator[str]:
    """Yield a message if the learning rate stays constant or the schedule ends in the first epoch.

    Args:
        make, optimizer, total: see `learning_rates`.
        first: the number of times that the run steps the schedule in the first epoch.
        unit: the unit in which `total` counts.

    Raises:
        UserError: a step fails.
    """
    schedule, rates = learning_rates(make, optimizer, total, min(total, MOST_STEPS))
    if isinstance(schedule, ReduceLROnPlateau):
        return
    state = schedule.state_dict()
    milestones = list(state.get("milestones") or state.get("_milestones") or [])
    if missed := [milestone for milestone in milestones if not 0 <= milestone < total]:
        yield f"scheduler: the milestones {missed} are never reached, because the run has {total} {unit}s."
    last = max((step for step in range(1, len(rates)) if rates[step] != rates[step - 1]), default=0)
    remedy = " If its settings count epochs, add +module.scheduler_interval=epoch." if unit == "step" else ""
    if last == 0 and not isinstance(schedule, ConstantLR):
        yield f"scheduler: the learning rate never changes within the {total} {unit}s of the run.{remedy}"
    elif 0 < last < first < total:
        yield f"scheduler: the learning rate does not change after step {last} of {total}, in the first epoch.{remedy}"
