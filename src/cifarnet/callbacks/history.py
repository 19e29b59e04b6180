"""The history of a run: the metrics of its epochs."""

import copy
import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.optim import Optimizer

from cifarnet.callbacks.loggers import Drawing, log_settings
from cifarnet.classifier import Classifier
from cifarnet.config import flat
from cifarnet.optim.schedules import planned_steps, warnings_about
from cifarnet.records import figures
from cifarnet.records.record import Session
from cifarnet.system import hardware
from cifarnet.system.log_output import report

SHORT = 5  # seconds; a shorter epoch is not checked for other processes on the machine
BUSY = 1 / 8  # the machine is busy if the threads wait for a core for more than this share of the time
STATE = ("epochs", "images", "learning_rate", "seconds", "sessions", "validations")  # saved in checkpoints


class History(Drawing):
    """Logs the metrics of each epoch, draws `accuracy.png`, and stores the metrics for the run's record.

    Metrics are logged by epoch. (Lightning logs them by training step, and adds a series "epoch".)

    Attributes:
        epochs: the metrics of each epoch; "epoch" counts from 1.
        images: the number of images trained on.
        learning_rate: the learning rate of the last optimizer step.
        seconds: the time spent on training batches; `test_seconds` is the time spent on the test.
        sessions: a description of each session; resuming a run adds one.
        validations: the metrics of all validations, including those within an epoch (trainer.val_check_interval).
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.images = 0
        self.learning_rate: Any = math.nan
        self.seconds = 0.0
        self.test_seconds = 0.0
        self.sessions: list[Session] = []
        self.validations: list[dict[str, float]] = []
        self._start = 0.0
        self._begun: tuple[float, float] | None = None  # when the session began: the time, and `waiting_seconds`

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        session = new_session(trainer)
        for last in self.sessions[-1:]:
            before, now = flat(last), flat(session)
            for key in sorted((before.keys() | now.keys()) - {"from_step", "started"}):
                if before.get(key) != now.get(key):
                    report(f"{key} was {before.get(key)} and is now {now.get(key)}")
        classifier, optimizer = cast("Classifier", module), trainer.optimizers[0]
        interval = classifier.scheduler_interval
        total, first = planned_steps(trainer, interval)
        libraries = {type(schedule.scheduler).__module__.partition(".")[0] for schedule in trainer.lr_scheduler_configs}
        is_known = libraries <= {"cifarnet", "torch"}  # other schedules may need the network's parameters
        if not self.sessions and classifier.make_scheduler is not None and is_known and total < math.inf:
            for message in warnings_about(classifier.make_scheduler, optimizer, int(total), first, interval):
                report(message)
        self.sessions.append(session)
        log_settings(trainer, module.hparams["config"])
        # TensorBoard's logger continues the curves of a resumed run; the others start new curves
        new = [logger for logger in trainer.loggers if not isinstance(logger, TensorBoardLogger)]
        for row in self.epochs:
            self._log(new, row)
        self._start = time.perf_counter()  # on_train_epoch_start is not called if a run resumes within an epoch
        self._begun = self._start, hardware.waiting_seconds()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        self.learning_rate = copy.deepcopy(optimizer.param_groups[0]["lr"])  # a schedule may change a tensor in place

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.images += cast("Any", trainer.train_dataloader).batch_size
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # the GPU may still be busy
        now = time.perf_counter()
        self.seconds += now - self._start
        self._start = now

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        batches, metrics = trainer.fit_loop.epoch_loop.batch_progress, cast("Classifier", module).means("val")
        fraction = 1 if batches.is_last_batch else batches.current.ready / trainer.num_training_batches
        self.validations.append({"epoch": trainer.current_epoch + fraction, "step": trainer.global_step, **metrics})
        if fraction < 1:
            within_epochs = {f"{name}_within_epochs": value for name, value in metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(within_epochs, trainer.global_step)
        self._start = time.perf_counter()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.test_seconds = time.perf_counter() - self._start  # the GPU is idle because the metrics have been read

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        row = {"epoch": trainer.current_epoch + 1, **cast("Classifier", module).training_metrics()}
        if self.validations and self.validations[-1]["epoch"] == row["epoch"]:
            row |= {name: value for name, value in self.validations[-1].items() if name.startswith("val/")}
        row["learning_rate"] = float(self.learning_rate)
        self.epochs.append(row)
        self._log(trainer.loggers, row)
        self._report_busy_machine(module)

    def _report_busy_machine(self, module: L.LightningModule) -> None:
        """After the first epoch of a session, report if the threads had to wait for a core.

        All threads wait for the slowest one in every operation. Therefore, fewer threads are faster on a busy machine:
        at most as many as ran at a time.
        """
        begun, self._begun = self._begun, None
        threads = torch.get_num_threads()
        if begun is None or threads == 1 or module.device.type != "cpu":
            return
        seconds, waited = time.perf_counter() - begun[0], hardware.waiting_seconds() - begun[1]
        if seconds > SHORT and waited > BUSY * threads * seconds:
            waits = f"in the first {seconds:.0f} s, the {threads} threads waited {waited:.0f} s in total for a core"
            fewer = f"threads={max(1, int(threads - waited / seconds))}"
            message = f"The machine is busy: {waits}. Fewer threads are faster on a busy machine: {fewer}"
            report(message, on_terminal=False)
            Tqdm.write(message)  # above the progress bar

    def _log(self, loggers: list[Logger], row: dict[str, float]) -> None:
        metrics = {key: value for key, value in row.items() if key not in ("epoch", "learning_rate")}
        metrics["train/learning_rate"] = row["learning_rate"]
        for logger in loggers:
            logger.log_metrics(metrics, step=int(row["epoch"]))
            logger.save()

    def draw(self, trainer: L.Trainer, classifier: Classifier) -> None:
        if self.epochs:
            figure = figures.accuracy([*self.epochs, *self.within_epochs])
            figures.save(figure, Path(trainer.default_root_dir) / "accuracy.png")

    @property
    def within_epochs(self) -> list[dict[str, float]]:
        """The validations before the end of an epoch."""
        return [row for row in self.validations if row["epoch"] % 1]


def new_session(trainer: L.Trainer) -> Session:
    """Describe the session that begins."""
    return {
        "from_step": trainer.global_step,
        "precision": str(trainer.precision),
        "hardware": hardware.describe(trainer.strategy.root_device, trainer.world_size),
        "versions": hardware.versions(),
        "git_commit": hardware.git_commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
