"""A progress bar that leaves one line per epoch."""

import sys
import time
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from cifarnet.classifier import Classifier
from cifarnet.system.log_output import report


class ProgressBar(TQDMProgressBar):
    """Shows the loss, accuracy, validation accuracy and images per second, in one line per epoch.

    If the output is not a terminal but a file or a notebook, only the final line of each epoch is printed.
    """

    BAR_FORMAT = "{l_bar}{bar:6}| [{elapsed}<{remaining}{postfix}]"  # short enough to leave room for the numbers

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=True)
        if not sys.stdout.isatty():
            self.disable()
        self._images = 0  # the number of images since `_start`, when the epoch began or was resumed
        self._start = self._images_per_second = 0.0
        self._validation: float | None = None  # the accuracy of the last validation in this epoch

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.train_progress_bar = Tqdm(disable=True)  # each epoch creates a new bar
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(_epoch(trainer))
        self._images, self._validation = 0, None
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += cast("Any", trainer.train_dataloader).batch_size
        self._images_per_second = self._images / (time.perf_counter() - self._start)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = cast("Classifier", pl_module).means("val")["val/accuracy"]
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        metrics = (f"{name} {value}" for name, value in self.get_metrics(trainer, module).items())
        report("  ".join([_epoch(trainer), *metrics]), on_terminal=self.is_disabled)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        means = cast("Classifier", module).means("train")
        metrics = {"loss": f"{means['train/cross_entropy']:.3f}", "accuracy": f"{means['train/accuracy']:.1%}"}
        if self._validation is not None:
            metrics["val"] = f"{self._validation:.1%}"
        metrics["images/s"] = f"{self._images_per_second:,.0f}"
        return metrics


def _epoch(trainer: L.Trainer) -> str:
    total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"Epoch {trainer.current_epoch + 1}{total}"
