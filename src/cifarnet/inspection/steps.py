"""Train a few steps to measure what a run costs, and to find a learning rate."""

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from cifarnet.build import Built, build
from cifarnet.data.shared_images import SharedImages
from cifarnet.errors import Diverged

WARM_UP, STEPS = 3, 10  # the first steps allocate memory and choose algorithms
MOST_SECONDS = 60.0  # of slow steps, fewer are measured
WINDOW = 5  # the losses whose mean decides whether a range test has diverged


def train_steps(config: DictConfig, callback: Callback, images: SharedImages, **trainer_settings: Any) -> Built:
    """Train a new network, with the seed of the run, until the callback stops it. Nothing is validated or written."""
    # the other callbacks write files; GradientAccumulationScheduler changes the number of steps
    callbacks = (config.get("callbacks") or {}).items()
    kept = {name: part for name, part in callbacks if part and part._target_.endswith("GradientAccumulationScheduler")}
    reduced: Any = OmegaConf.merge(config)
    reduced.callbacks, reduced.logger = kept, {}
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    settings |= {"min_epochs": None, "min_steps": None}  # the callback stops earlier
    built = build(reduced, [callback], images=images, **(settings | trainer_settings))
    built.trainer.fit(built.classifier, datamodule=built.data)
    return built


class Measure(Callback):
    """Measures the seconds of training batches of each image size, and the memory; then it stops the run.

    Attributes:
        seconds: the seconds of the batches of each image size, in the order of training.
        memory: the largest resident memory of this process after a forward pass, in bytes. On a GPU, the largest
            memory that PyTorch has reserved.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.memory = 0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        sizes = (loader.sizes or [loader.image_size])[: trainer.max_epochs if trainer.max_epochs != -1 else None]
        self.seconds = {size: [] for size in sizes}
        steps = pl_module.total_steps  # pyright: ignore[reportAttributeAccessIssue]
        self._count = int(max(1, min(WARM_UP + STEPS, steps // len(self.seconds))))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        self.memory = max(self.memory, psutil.Process().memory_info().rss)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.memory = torch.cuda.max_memory_reserved(device)
        now = time.perf_counter()
        seconds = self.seconds.setdefault(batch.images.shape[-1], [])
        seconds.append(now - self._start)
        if len(seconds) >= self._count or sum(seconds) > MOST_SECONDS:
            left = [size for size, measured in self.seconds.items() if not measured]
            loader: Any = trainer.train_dataloader
            loader.sizes = left[:1]
            trainer.should_stop = not left
        self._start = time.perf_counter()

    def typical(self) -> dict[int, float]:
        """Return the median seconds of a batch of each image size, without the warm-up."""
        return {size: statistics.median(times[WARM_UP:] or times) for size, times in self.seconds.items() if times}


def training_seconds(seconds: dict[int, float], sizes: Sequence[int], batches: float, epochs: float) -> float:
    """Estimate the seconds of all training batches of a run, without validation and test.

    Args:
        seconds: the seconds of a batch of each image size.
        sizes: the image size in each epoch; the last one applies to all later epochs.
        batches: the number of batches in an epoch.
        epochs: the number of epochs, of which the last may be a fraction.
    """
    total = 0.0
    for epoch in range(math.ceil(epochs)):
        total += batches * min(1.0, epochs - epoch) * seconds[sizes[min(epoch, len(sizes) - 1)]]
    return total


class RangeTest(Callback):
    """The learning-rate range test (Smith, 2017, https://arxiv.org/abs/1506.01186): one optimizer step at each rate.

    All parameter groups keep their ratio to the first group. The test ends early if the mean of the last losses is
    infinite or NaN, or above four times its lowest value.

    Args:
        rates: the learning rates of the first parameter group, in ascending order.

    Attributes:
        losses: the training loss before the step at each rate.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = rates
        self.losses: list[float] = []
        self._batches: list[float] = []  # whose gradients are accumulated
        self._initial: list[float] = []
        self._lowest = math.inf

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        groups = trainer.optimizers[0].param_groups
        self._initial = self._initial or [group["lr"] for group in groups]
        first = self._initial[0]
        for group, initial in zip(groups, self._initial, strict=True):
            group["lr"] = self.rates[trainer.global_step] * (1.0 if initial == first else initial / first)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(outputs["losses"].mean().item())
        if trainer.global_step == len(self.losses):
            return  # the optimizer has not made a step
        self.losses.append(statistics.mean(self._batches))
        self._batches = []
        recent = statistics.mean(self.losses[-WINDOW:])
        self._lowest = min(self._lowest, recent)
        if not recent <= 4 * self._lowest:  # true for NaN
            trainer.should_stop = True


def range_test(config: DictConfig, rates: Sequence[float], images: SharedImages) -> list[float]:
    """Return the losses of a range test on a new network with the initial weights of the run; it can end early."""
    test = RangeTest(rates)
    constant: Any = OmegaConf.merge(config, {"scheduler": None})
    with contextlib.suppress(Diverged):  # this is one end of the test
        train_steps(constant, test, images, max_epochs=-1, max_steps=len(rates), max_time=None)
    return test.losses
