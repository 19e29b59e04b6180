"""A few training steps, which measure what a run costs or find a learning rate."""

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from omegaconf import DictConfig, OmegaConf

from cifarnet.build import Built, build
from cifarnet.callbacks.history import History
from cifarnet.data.shared_images import SharedImages
from cifarnet.errors import Diverged, UserError
from cifarnet.optim.schedules import planned_steps
from cifarnet.records.figures import panel

WARM_UP, STEPS = 3, 10  # the first steps are slower
MOST_SECONDS = 60  # of slow steps, fewer are measured
MOST_LOSS = 1e9  # recorded for larger losses, and for NaN


class Steps(Callback):
    """Records the loss and the seconds of each batch, and the memory, and stops the run.

    Without rates, it stops after the warm-up and ten batches. With rates, it is the learning-rate range test (Smith,
    2017, https://arxiv.org/abs/1506.01186): the first parameter group makes one optimizer step at each rate, and the
    other groups keep their ratio to it. `max_steps` must stop the run.

    Attributes:
        rates, losses, seconds: of each batch; the learning rate is that of the first parameter group.
        memory: the largest resident memory of this process after a forward pass, in bytes.
    """

    def __init__(self, planned_rates: Sequence[float] = ()) -> None:
        self.planned_rates = planned_rates
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.memory = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        first = groups[0]["lr"]
        for group in groups if self.planned_rates else ():
            group["lr"] = self.planned_rates[trainer.global_step] * (group["lr"] / first if first else 1)
        self.rates.append(groups[0]["lr"])

    def on_before_backward(self, *_: Any) -> None:
        self.memory = max(self.memory, psutil.Process().memory_info().rss)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(min(MOST_LOSS, outputs["losses"].mean().item()))  # waits for the GPU
        self.seconds.append(time.perf_counter() - self._start)
        is_measured = len(self.seconds) == WARM_UP + STEPS or sum(self.seconds) > MOST_SECONDS
        trainer.should_stop = is_measured and not self.planned_rates
        self._start = time.perf_counter()


def build_steps(config: DictConfig, steps: Steps, images: SharedImages, **trainer_settings: Any) -> Built:
    """Build a run that trains until `steps` stops it, and that validates and writes nothing."""
    reduced: Any = OmegaConf.to_container(config, resolve=False)
    # other callbacks write files; this one changes the number of steps
    callbacks = (reduced.get("callbacks") or {}).items()
    kept = {name: part for name, part in callbacks if "GradientAccumulationScheduler" in str(part)}
    reduced |= {"callbacks": kept, "logger": {}} | ({"scheduler": None} if steps.planned_rates else {})
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    settings |= {"min_epochs": None, "min_steps": None} | trainer_settings
    created: Any = OmegaConf.create(reduced)
    return build(created, [History(), steps], images=images, **settings)


def costs(built: Built, measured: Steps, sizes: Sequence[int] | None) -> dict[str, str]:
    """Return the number of steps, and estimates of the seconds and the memory of a run, as text.

    Args:
        sizes: `data.train_sizes`. The seconds are assumed to be proportional to the number of pixels.
    """
    if not measured.seconds:
        raise UserError("The run has no training batches. Set trainer.max_epochs and trainer.limit_train_batches.")
    trainer, (total, per_epoch) = built.trainer, planned_steps(built.trainer, "step")
    batches, batch_size = trainer.num_training_batches, built.data.train_dataloader().batch_size
    times = measured.seconds[WARM_UP:] or measured.seconds
    seconds = statistics.median(times)
    speed = f"{seconds:.4f} s per batch, {batch_size / seconds:,.0f} images/s (median of {len(times)} batches)"
    rows = {"epoch": f"{per_epoch:,} steps, {batches:,} batches of {batch_size} images", "speed": speed}
    if total < math.inf:
        shares = [(size / built.data.image_size) ** 2 for size in sizes or [built.data.image_size]]
        epochs = sum(shares[min(step // per_epoch, len(shares) - 1)] for step in range(int(total))) / per_epoch
        rows["training"] = f"about {epochs * batches * seconds:,.0f} s for {total:,} steps, without validation and test"
    rows["memory"] = f"{measured.memory / 2**20:,.0f} of {psutil.virtual_memory().total / 2**20:,.0f} MiB"
    if (device := trainer.strategy.root_device).type == "cuda":
        used, whole = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
        rows["GPU memory"] = f"{used / 2**20:,.0f} of {whole / 2**20:,.0f} MiB"
    return rows


def draw_schedule(built: Built) -> Figure:
    """Draw the learning rates of the parameter groups against the epoch; of a run without an end, in the first epoch.

    ReduceLROnPlateau, which needs validations, stays at the initial rate.
    """
    total, per_epoch = planned_steps(built.trainer, built.classifier.scheduler_interval)
    made, rates = built.classifier.configure_optimizers(), []
    groups = made["optimizer"].param_groups
    warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before.*")  # the optimizer makes no steps
    for _ in range(int(total) if total < math.inf else per_epoch):
        rates.append([float(group["lr"]) for group in groups])
        if "lr_scheduler" in made:
            built.classifier.lr_scheduler_step(made["lr_scheduler"]["scheduler"], None)
    values, epochs = np.array(rates), np.arange(len(rates)) / per_epoch
    kinds = [group.get("kind", f"group {number}") for number, group in enumerate(groups)]
    labels = [f"{kind}: at most {most:.3g}" for kind, most in zip(kinds, values.max(0), strict=True)]
    several = len(groups) > 1  # their rates can differ by orders of magnitude
    figure, axis = panel("epoch", "learning rate, as a fraction of its maximum" if several else "learning rate")
    axis.plot(epochs, values / np.maximum(values.max(0), 1e-99) if several else values, label=labels)
    axis.legend(frameon=False)
    return figure


def range_test(config: DictConfig, rates: Sequence[float], images: SharedImages) -> Steps:
    """Run a learning-rate range test on a new network with the initial weights of the run."""
    steps = Steps(rates)
    trainer, classifier, data, _ = build_steps(config, steps, images, max_epochs=-1, max_steps=len(rates))
    with contextlib.suppress(Diverged):
        trainer.fit(classifier, datamodule=data)
    return steps


def suggest(test: Steps) -> tuple[str, Figure]:
    """Suggest the learning rate at which the smoothed loss of a range test is lowest, and draw the test.

    Smith proposes it as the highest rate of a schedule, because the loss rises or becomes ragged at higher rates. There
    is no suggestion if the loss falls by less than the standard deviation of the losses about the smoothed loss.
    """
    rates, losses = test.rates[: len(test.losses)], np.array(test.losses)
    window = np.ones(2 * (len(losses) // 14) + 1)  # a seventh of the losses; fewer at the ends
    smoothed = np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")
    lowest = int(smoothed.argmin())
    fall, noise = smoothed[0] - smoothed[lowest], (losses - smoothed)[: lowest + 1].std()
    figure, axis = panel("learning rate", "training loss of a batch")
    axis.semilogx(rates, losses, ".", alpha=0.5, label="losses")
    axis.semilogx(rates, smoothed, label="smoothed")
    axis.axvline(rates[lowest], color="gray", linestyle="--", label=f"lowest smoothed loss, at {rates[lowest]:.2g}")
    axis.set_ylim(losses.min() - 0.05, losses[: lowest + 1].max() + 0.2)  # later losses may be huge
    axis.xaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())  # not as mathematics
    axis.legend(frameon=False, loc="lower left")
    suggestion = f"optimizer.lr={rates[lowest]:.2g}, the rate of the lowest smoothed loss, as the peak of a schedule"
    if fall <= noise or rates[lowest] == test.planned_rates[-1]:
        reason = f"the loss falls by {fall:.2g} up to {rates[lowest]:.2g}, and its noise is {noise:.2g}"
        suggestion = f"none: {reason}. Change lr_min, lr_max or lr_steps."
    return suggestion, figure
