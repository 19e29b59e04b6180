"""A few training steps, which measure what a run costs or find a learning rate."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, cast

import lightning as L
import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import LambdaLR

from cifarnet.build import Built, build
from cifarnet.callbacks.history import History
from cifarnet.data.shared_images import SharedImages
from cifarnet.errors import UserError
from cifarnet.optim.schedules import batches_per_step, learning_rates, planned_steps
from cifarnet.records.figures import panel

WARM_UP, STEPS = 3, 10  # the first steps are slower
MOST_SECONDS = 60  # of slow steps, fewer are measured
MOST_LOSS = 1e9  # recorded for larger losses, and for NaN


class Steps(Callback):
    """Records the loss and the seconds of each batch, and the memory, and stops the run.

    Args:
        max_batches: the number of batches after which the run stops.
        max_seconds: the seconds of the batches after which it stops earlier.

    Attributes:
        losses, seconds: of each batch.
        memory: the largest resident memory of this process after a forward pass, in bytes.
    """

    def __init__(self, max_batches: float = WARM_UP + STEPS, max_seconds: float = MOST_SECONDS) -> None:
        self.max_batches, self.max_seconds = max_batches, max_seconds
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.memory = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_before_backward(self, *_: Any) -> None:
        self.memory = max(self.memory, psutil.Process().memory_info().rss)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(min(MOST_LOSS, outputs["losses"].mean().item()))  # waits for the GPU
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) == self.max_batches or sum(self.seconds) > self.max_seconds:
            trainer.should_stop = True
        self._start = time.perf_counter()


def build_steps(config: DictConfig, steps: Steps, images: SharedImages, **trainer_settings: Any) -> Built:
    """Build a run that trains until `steps` stops it, and that validates and writes nothing."""
    reduced: Any = OmegaConf.to_container(config, resolve=False)
    # other callbacks write files, or stop a range test that diverges; this one changes the number of steps
    callbacks = (reduced.get("callbacks") or {}).items()
    kept = {name: part for name, part in callbacks if "GradientAccumulationScheduler" in str(part)} | {"nan": None}
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    settings |= {"min_epochs": None, "min_steps": None} | trainer_settings
    created: Any = OmegaConf.create(reduced | {"callbacks": kept, "logger": {}})
    return build(created, [History(), steps], images=images, **settings)


def step_batches(trainer: L.Trainer) -> Iterator[tuple[int, int]]:
    """Yield the epoch (from 0) and the number of batches of each optimizer step, without an end."""
    batches = int(trainer.num_training_batches)
    for epoch in count():
        size = batches_per_step(trainer, epoch)
        yield from ((epoch, min(size, batches - start)) for start in range(0, batches, size))


def costs(built: Built, measured: Steps, sizes: Sequence[int] | None) -> dict[str, str]:
    """Return the number of steps, and estimates of the seconds and the memory of a run, as text.

    Args:
        sizes: `data.train_sizes`. The seconds are assumed to be proportional to the number of pixels.
    """
    if not measured.seconds:
        raise UserError("The run has no training batches. Set trainer.max_epochs and trainer.limit_train_batches.")
    trainer, (total, per_epoch) = built.trainer, planned_steps(built.trainer, "step")
    batches, batch_size = trainer.num_training_batches, cast("Any", trainer.train_dataloader).batch_size
    times = measured.seconds[WARM_UP:] or measured.seconds
    seconds = statistics.median(times)
    speed = f"{seconds:.4f} s per batch, {batch_size / seconds:,.0f} images/s (median, n = {len(times)})"
    rows = {"epoch": f"{per_epoch:,} steps, {batches:,} batches of {batch_size} images", "speed": speed}
    if total < math.inf:
        shares = [(size / built.data.image_size) ** 2 for size in sizes or [built.data.image_size]]
        steps = islice(step_batches(trainer), int(total))
        full = sum(size * shares[min(epoch, len(shares) - 1)] for epoch, size in steps)  # batches of full-size images
        rows["training"] = f"about {full * seconds:,.0f} s for {total:,} steps, without validation and test"
    rows["memory"] = f"{measured.memory / 2**20:,.0f} of {psutil.virtual_memory().total / 2**20:,.0f} MiB"
    if (device := trainer.strategy.root_device).type == "cuda":
        used, whole = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
        rows["GPU memory"] = f"{used / 2**20:,.0f} of {whole / 2**20:,.0f} MiB"
    return rows


def draw_schedule(built: Built) -> Figure:
    """Draw the learning rates of the parameter groups at each step, or in each epoch if the schedule counts epochs.

    For a run without an end, the first epoch is drawn. ReduceLROnPlateau, which needs validations, stays at the initial
    rate.
    """
    unit, optimizer = built.classifier.scheduler_interval, built.trainer.optimizers[0]
    total, in_epoch = planned_steps(built.trainer, unit)
    steps = int(total) if total < math.inf else in_epoch
    make = built.classifier.make_scheduler or (lambda optimizer, _: LambdaLR(optimizer, lambda _: 1.0))
    values = np.array(learning_rates(make, optimizer, steps, steps)[1])
    kinds = [group.get("kind", f"group {number}") for number, group in enumerate(optimizer.param_groups)]
    labels = [f"{kind}: at most {most:.3g}" for kind, most in zip(kinds, values.max(0), strict=True)]
    several = len(labels) > 1  # their rates can differ by orders of magnitude
    figure, axis = panel(unit, "learning rate, as a fraction of its maximum" if several else "learning rate")
    axis.plot(values / np.maximum(values.max(0), 1e-99) if several else values, label=labels)
    axis.legend(frameon=False)
    return figure


def range_test(config: DictConfig, rates: Sequence[float], images: SharedImages) -> tuple[list[float], list[float]]:
    """Run a learning-rate range test (Smith, 2017, https://arxiv.org/abs/1506.01186) on a new network with the initial
    weights of the run: one optimizer step at each value of `optimizer.lr`.

    The rates of all parameter groups keep their ratio to `optimizer.lr`. (Lightning's Tuner gives all groups the same
    rate, and removes all callbacks, which include the recipes.)

    Returns:
        The learning rate and the loss of each batch.
    """
    steps = Steps(math.inf, math.inf)
    trainer, classifier, data, _ = build_steps(config, steps, images, max_epochs=-1, max_steps=len(rates))
    last, lr = len(rates) - 1, config.optimizer.lr
    classifier.scheduler_interval = "step"
    classifier.make_scheduler = lambda optimizer, _: LambdaLR(optimizer, lambda step: rates[min(step, last)] / lr)
    trainer.fit(classifier, datamodule=data)
    used = [rate for rate, (_, size) in zip(rates, step_batches(trainer), strict=False) for _ in range(size)]
    return used[: len(steps.losses)], steps.losses


def suggest(rates: Sequence[float], losses: Sequence[float], lr: float) -> tuple[str, Figure]:
    """Suggest the learning rate at which the smoothed loss of a range test is lowest, and draw the test.

    At higher rates, the loss rises or becomes ragged (Smith, 2017), so use it as the highest rate of a schedule. There
    is no suggestion if the smoothed loss falls by less than its noise, four standard errors.

    Args:
        rates, losses: the results of `range_test`.
        lr: the value of `optimizer.lr` in the run.
    """
    values = np.array(losses)
    window = np.ones(2 * (len(values) // 14) + 1)  # a seventh of the losses; fewer at the ends
    smoothed = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    lowest = int(smoothed.argmin())
    # medians, because the first losses of some networks have no noise, and the last ones may be huge
    deviations = 1.48 * np.abs(values - smoothed)  # the median is the standard deviation if the noise is normal
    spread = max(np.median(deviations), np.median(deviations[: lowest + 1][-len(window) :]))
    fall, noise = values[: len(window)].mean() - smoothed[lowest], 4 * spread / math.sqrt(len(window))
    figure, axis = panel("optimizer.lr", "training loss of a batch")
    axis.semilogx(rates, values, ".", alpha=0.5, label="losses")
    axis.semilogx(rates, smoothed, label="smoothed")
    axis.axvline(rates[lowest], color="gray", linestyle="--", label=f"lowest smoothed loss, at {rates[lowest]:.2g}")
    axis.set_ylim(values.min() - 0.05, values[: lowest + 1].max() + 0.2)  # later losses may be huge
    axis.xaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())  # not as mathematics
    axis.legend(frameon=False, loc="lower left")
    if fall <= noise:
        reason = f"the loss falls by {fall:.2g}, not more than its noise of {noise:.2g}"
        return f"none: {reason}. Raise lr_steps, or change lr_min and lr_max.", figure
    if rates[lowest] == rates[-1]:
        return f"none: the loss is still falling at lr_max={rates[-1]:.2g}. Raise lr_max.", figure
    found = f"optimizer.lr={rates[lowest]:.2g}, the rate of the lowest smoothed loss, as the highest rate of a schedule"
    return f"{found} (all rates of the optimizer × {rates[lowest] / lr:.2g})", figure
