"""The training step of the baseline, for the benchmarks."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from cifarnet.build import Built, build
from cifarnet.cli import compose, key_of
from cifarnet.system import hardware
from cifarnet.system.log_output import quiet_libraries

WARMUP, BATCHES = 20, 200  # numbers of steps; the warm-up is not measured


def compose_baseline(*overrides: str) -> DictConfig:
    """Compose an experiment (by default, the baseline) on synthetic images, with training only."""
    given = {key_of(override) for override in overrides}
    usual = ["+experiment=baseline", "data=synthetic", "trainer=cpu", "output_dir=/nowhere", "~callbacks", "~logger"]
    chosen = [setting for setting in usual if key_of(setting) not in given] + list(overrides)
    config = compose("train", chosen)
    if "data" in given:
        return config
    return compose("train", [*chosen, f"data.train_size={int(1.2 * (WARMUP + BATCHES) * config.data.batch_size)}"])


def prepare(config: DictConfig) -> None:
    """Set up this process as `cifarnet.train` does for a run."""
    quiet_libraries()
    if config.keep_freed_memory:
        hardware.keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def build_steps(config: DictConfig, callbacks: Sequence[Callback] = (), **settings: Any) -> Built:
    """Build a run of WARMUP + BATCHES steps, without validation."""
    prepare(config)
    few = {"max_epochs": 1, "limit_train_batches": WARMUP + BATCHES, "limit_val_batches": 0}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
    return build(config, callbacks, **(few | quiet | settings))


def now(device: torch.device) -> float:
    """Wait for the device and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Timer(Callback):
    """Measure the seconds per step, from the end of the warm-up to the end of the last step."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    @property
    def seconds_a_step(self) -> float:
        if not self.start:
            sys.exit(f"An epoch has fewer than {WARMUP + BATCHES} batches. Use more images or smaller batches.")
        return (self.end - self.start) / BATCHES

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 in (WARMUP, WARMUP + BATCHES):
            self.start, self.end = self.end, now(module.device)


def seconds_a_step(config: DictConfig, **settings: Any) -> float:
    """Return the seconds per step of Lightning's Trainer."""
    timer = Timer()
    built = build_steps(config, [timer], **settings)
    built.trainer.fit(built.classifier, datamodule=built.data)
    return timer.seconds_a_step
