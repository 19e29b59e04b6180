"""What is kept of a run's epochs: a row each in the history."""

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from cifarnet.callbacks.loggers import log_settings
from cifarnet.records import figures
from cifarnet.system import hardware
from cifarnet.system.log_output import report


class History(Callback):
    """Metrics against epoch: for the logger, for `accuracy.png`, and kept in the checkpoint.

    Lightning would log them against the training step and add a series named "epoch". A run that was stopped and gone
    on with has several sessions; what each was trained with is kept too.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []  # a row each, "epoch" counts from 1
        self.images = 0  # trained on
        self.seconds = 0.0  # spent in training batches
        self.test_seconds = 0.0
        self.sessions: list[dict[str, Any]] = []
        self.validations: list[dict[str, float]] = []  # all, those within an epoch too (trainer.val_check_interval)
        self._start = 0.0
        self._validation: dict[str, float] = {}  # of this epoch, if it was validated

    def state_dict(self) -> dict[str, Any]:
        kept = {"epochs": self.epochs, "images": self.images, "seconds": self.seconds}
        return kept | {"sessions": self.sessions, "validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images, self.seconds = list(state["epochs"]), state["images"], state["seconds"]
        self.sessions = list(state["sessions"])
        self.validations = list(state["validations"])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin_session(trainer)
        log_settings(trainer, module.hparams["config"])
        # TensorBoard's goes on with a resumed run's curves; others begin anew
        anew = [logger for logger in trainer.loggers if not isinstance(logger, TensorBoardLogger)]
        for row in self.epochs:
            self._log(anew, row)
        self._start = time.perf_counter()  # a run that is resumed in the middle of an epoch does not start it

    def _begin_session(self, trainer: L.Trainer) -> None:
        now = session(trainer)
        if self.sessions:
            for what in ("precision", "hardware", "git_commit"):
                if (before := self.sessions[-1][what]) != now[what]:
                    was, is_now = _changed(before, now[what])
                    report(f"{what.replace('_', ' ')} was {was}, now {is_now}")
        self.sessions.append(now)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.images += trainer.train_dataloader.batch_size
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


def session(trainer: L.Trainer) -> dict[str, Any]:
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
