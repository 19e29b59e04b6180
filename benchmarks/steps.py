"""The baseline's training step, as the benchmarks run it."""

import time
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from cifarnet import cpu
from cifarnet.classifier import Classifier
from cifarnet.cli import CONFIGS
from cifarnet.data import ImageDataModule
from cifarnet.train import best_precision, quieten_lightning

WARMUP, BATCHES = 20, 200  # steps: first those that are not measured


def compose_baseline(*overrides: str) -> DictConfig:
    """A recipe, the baseline if none is named, on pictures that need no download; its CPU settings are applied."""
    quieten_lightning()
    recipe = ["+experiment=baseline", "data=synthetic", "trainer=cpu", "output_dir=/nowhere"]
    given = {override.partition("=")[0] for override in overrides}
    recipe = [setting for setting in recipe if setting.partition("=")[0] not in given] + list(overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", recipe)
    if config.trainer.precision == "auto":
        config.trainer.precision = best_precision(config.trainer.accelerator)
    config.data.train_size = int(1.2 * (WARMUP + BATCHES) * config.data.batch_size)
    if config.keep_freed_memory:
        cpu.keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    config.total_steps = WARMUP + BATCHES
    return config


def make_data(config: DictConfig) -> ImageDataModule:
    data = instantiate(config.data)
    data.setup()
    return data


def make_module(config: DictConfig, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    return instantiate(config.module, _partial_=True)(
        network=instantiate(config.model),
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        **settings,
    )


def make_trainer(config: DictConfig, callbacks: list[Callback], **settings: Any) -> L.Trainer:
    """Lightning's Trainer for WARMUP + BATCHES steps, without validation."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    steps = {"max_epochs": 1, "limit_train_batches": WARMUP + BATCHES}
    return instantiate(config.trainer, _partial_=True)(callbacks=callbacks, **(quiet | steps | settings))


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Timer(Callback):
    """Seconds a step, from the end of the warm-up to the end of the last step."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    @property
    def seconds_a_step(self) -> float:
        return (self.end - self.start) / BATCHES

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 in (WARMUP, WARMUP + BATCHES):
            self.start, self.end = self.end, now(module.device)
