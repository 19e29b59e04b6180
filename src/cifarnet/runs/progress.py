"""What is shown and kept of a run's epochs: a line each on the terminal, a row each in the history."""

import logging
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from cifarnet import hardware
from cifarnet.errors import printable
from cifarnet.runs import figures
from cifarnet.runs.loggers import log_settings


def tell(lines: str, on_terminal: bool = True) -> None:
    """Show lines of a run, and keep them in its `train.log`."""
    logging.getLogger("cifarnet").info(lines)
    if on_terminal:
        print(printable(lines), flush=True)


class ProgressBar(TQDMProgressBar):
    """One line an epoch, which stays: loss, accuracy, images/s, and validation accuracy once it is known.

    Where the output is no terminal (a file, a notebook) there is no moving bar, only the line.
    """

    BAR_FORMAT = "{l_bar}{bar:6}| [{elapsed}<{remaining}{postfix}]"  # short enough to leave room for the numbers

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=True)
        if not sys.stdout.isatty():
            self.disable()
        self._start: tuple[float, int] | None = None  # time and batch at which this epoch, or its rest, began
        self._images_per_second = 0.0

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.train_progress_bar = Tqdm(disable=True)  # every epoch makes its own
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(_epoch(trainer))
        self._start = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._start is None:
            self._start = time.perf_counter(), batch_idx

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._start is not None
        start, first_batch = self._start
        self._images_per_second = (batch_idx + 1 - first_batch) * _batch_size(trainer) / (time.perf_counter() - start)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        metrics = (f"{name} {value}" for name, value in self.get_metrics(trainer, module).items())
        tell("  ".join([_epoch(trainer), *metrics]), on_terminal=self.is_disabled)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
        means = module.means("train")
        metrics = {
            "loss": f"{means['train/cross_entropy']:.3f}",
            "accuracy": f"{means['train/accuracy']:.1%}",
        }
        if "val/accuracy" in trainer.callback_metrics:
            metrics["val"] = f"{trainer.callback_metrics['val/accuracy'].item():.1%}"
        metrics["images/s"] = f"{self._images_per_second:,.0f}"
        return metrics


def _batch_size(trainer: L.Trainer) -> int:
    """Of all ranks together."""
    return trainer.train_dataloader.batch_size


def _epoch(trainer: L.Trainer) -> str:
    total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"Epoch {trainer.current_epoch + 1}{total}"


class History(Callback):
    """Metrics against epoch: for the logger, for `accuracy.png`, and kept in the checkpoint.

    Lightning would log them against the training step and add a series named "epoch". A run that was stopped and gone
    on with has several stretches; what each was trained with is kept too.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []  # a row each, "epoch" counts from 1
        self.images = 0  # trained on
        self.seconds = 0.0  # spent in training batches
        self.test_seconds = 0.0
        self.stretches: list[dict[str, Any]] = []
        self.validations: list[dict[str, float]] = []  # all, those within an epoch too (trainer.val_check_interval)
        self._start = 0.0
        self._validation: dict[str, float] = {}  # of this epoch, if it was validated

    def state_dict(self) -> dict[str, Any]:
        kept = {"epochs": self.epochs, "images": self.images, "seconds": self.seconds}
        return kept | {"stretches": self.stretches, "validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images, self.seconds = list(state["epochs"]), state["images"], state["seconds"]
        self.stretches = list(state.get("stretches", []))  # version 0.1 kept none
        self.validations = list(state.get("validations", []))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin_stretch(trainer)
        log_settings(trainer, module.hparams["config"])
        # TensorBoard's goes on with a resumed run's curves; others begin anew
        anew = [logger for logger in trainer.loggers if not isinstance(logger, TensorBoardLogger)]
        for row in self.epochs:
            self._log(anew, row)
        self._start = time.perf_counter()  # a run that is resumed in the middle of an epoch does not start it

    def _begin_stretch(self, trainer: L.Trainer) -> None:
        now = stretch(trainer)
        if self.stretches:
            for what in ("precision", "hardware", "git_commit"):
                if (before := self.stretches[-1][what]) != now[what]:
                    was, is_now = _changed(before, now[what])
                    tell(f"{what.replace('_', ' ')} was {was}, now {is_now}")
        self.stretches.append(now)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.images += _batch_size(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # it may still be at work
        now = time.perf_counter()
        self.seconds += now - self._start
        self._start = now

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep_validation(trainer, module.means("val"))
        self._start = time.perf_counter()

    def _keep_validation(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress
        part = 1 if batches.is_last_batch else batches.current.ready / trainer.num_training_batches
        self.validations.append({"epoch": trainer.current_epoch + part, "step": trainer.global_step, **metrics})
        if part == 1:
            self._validation = metrics
            return
        for logger in trainer.loggers:
            logger.log_metrics({f"{name}_within_epochs": value for name, value in metrics.items()}, trainer.global_step)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.test_seconds = time.perf_counter() - self._start  # the metrics have been read: nothing is still at work

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        row = {
            "epoch": trainer.current_epoch + 1,
            **module.training_metrics(),
            **self._validation,
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
        }
        self._validation = {}
        self.epochs.append(row)
        self._log(trainer.loggers, row)

    def _log(self, loggers: list[Logger], row: dict[str, float]) -> None:
        names = {"learning_rate": "train/learning_rate"}
        shown = {names.get(key, key): value for key, value in row.items() if key != "epoch"}
        for logger in loggers:
            logger.log_metrics(shown, step=row["epoch"])
            logger.save()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.epochs and trainer.is_global_zero:
            rows = sorted([*self.epochs, *self.within_epochs], key=lambda row: row["epoch"])
            figures.save(figures.accuracy(rows), Path(trainer.default_root_dir) / "accuracy.png")

    @property
    def within_epochs(self) -> list[dict[str, float]]:
        """The validations that are in no row of an epoch's."""
        return [row for row in self.validations if row["epoch"] % 1]


def stretch(trainer: L.Trainer) -> dict[str, Any]:
    """What a run is trained with from here on, as plain data."""
    return {
        "from_step": trainer.global_step,
        "precision": str(trainer.precision),
        "hardware": hardware.describe(trainer.strategy.root_device, trainer.world_size),
        "versions": hardware.versions(),
        "git_commit": hardware.git_commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _changed(*values: Any) -> list[str]:
    """Both for the terminal: of dictionaries, what differs."""
    if not all(isinstance(value, dict) for value in values):
        return list(map(str, values))
    before, now = values
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [", ".join(f"{key} {value.get(key)}" for key in keys) for value in values]
