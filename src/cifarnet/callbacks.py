"""What Lightning and TensorBoard do not already do, once an epoch or less."""

import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.utils import make_grid

from cifarnet import report
from cifarnet.errors import Interrupted, Pruned, UserError

if TYPE_CHECKING:
    from optuna import Trial


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
        self._images_per_second = (batch_idx + 1 - first_batch) * len(batch[1]) / (time.perf_counter() - start)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        if self.is_disabled:
            metrics = (f"{name} {value}" for name, value in self.get_metrics(trainer, module).items())
            print(_epoch(trainer), *metrics, sep="  ", flush=True)

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


def _epoch(trainer: L.Trainer) -> str:
    total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"Epoch {trainer.current_epoch + 1}{total}"


class History(Callback):
    """Metrics against epoch: for the logger, for `accuracy.png`, and kept in the checkpoint.

    Lightning would log them against the training step and add a series named "epoch".

    Args:
        dirpath: where `accuracy.png` goes.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        self.epochs: list[dict[str, float]] = []  # a row each, "epoch" counts from 1
        self.images = 0  # trained on
        self.seconds = 0.0  # spent in training batches
        self.test_seconds = 0.0
        self._start = 0.0
        self._validation: dict[str, float] = {}  # of this epoch, if it was validated

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images, self.seconds = list(state["epochs"]), state["images"], state["seconds"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if isinstance(trainer.logger, CSVLogger):  # it begins a new file: repeat what a resumed run had
            for row in self.epochs:
                self._log(trainer, row)
        self._start = time.perf_counter()  # a run that is resumed in the middle of an epoch does not start it

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.images += len(batch[1])
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # it may still be at work
        now = time.perf_counter()
        self.seconds += now - self._start
        self._start = now

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._validation = module.means("val")
        self._start = time.perf_counter()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.test_seconds = time.perf_counter() - self._start  # the metrics have been read: nothing is still at work

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        row = {
            "epoch": trainer.current_epoch + 1,
            **module.training_metrics(),
            **self._validation,
            "learning_rate": float(module.optimizer.param_groups[0]["lr"]),
        }
        self._validation = {}
        self.epochs.append(row)
        self._log(trainer, row)

    def _log(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in row.items() if key != "epoch"}, step=row["epoch"])
            logger.save()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.epochs:
            report.accuracy(self.epochs).savefig(self.dirpath / "accuracy.png")


class Pictures(Callback):
    """What a table of numbers hides: the augmented batch, predictions with mistakes, the confusion matrix.

    All go to TensorBoard (where it is the logger); the predictions also to `predictions.png`.

    Args:
        dirpath: where `predictions.png` goes.
        count: how many test pictures are shown.
    """

    def __init__(self, dirpath: str, count: int = 40) -> None:
        self.dirpath = Path(dirpath)
        self.count = count
        self._predicted: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and (writer := _writer(trainer)) is not None:
            writer.add_image("train/augmented_batch", make_grid(batch[0][:64].cpu(), nrow=8), 0)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._predicted = []

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        self._predicted.append(outputs.argmax(1))

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        test, class_names = trainer.datamodule.source.test, trainer.datamodule.class_names
        predicted = torch.cat(self._predicted).cpu()
        tested = len(predicted)  # fewer than all under trainer.limit_test_batches
        shown = torch.randperm(tested, generator=torch.Generator().manual_seed(0))[: self.count]
        images = torch.stack([test.images[i] for i in shown.tolist()])
        figure = report.predictions(images, test.labels[shown], predicted[shown], class_names)
        figure.savefig(self.dirpath / "predictions.png")
        writer = _writer(trainer)
        if writer is not None:
            matrix = multiclass_confusion_matrix(predicted, test.labels[:tested], num_classes=len(class_names))
            for name, drawn in [("predictions", figure), ("confusion_matrix", report.confusion(matrix, class_names))]:
                writer.add_image(f"test/{name}", report.as_image(drawn), trainer.current_epoch)


def _writer(trainer: L.Trainer) -> SummaryWriter | None:
    return trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None


class Compile(Callback):
    """Compile the network, in place, and take a step on blank images before training, to time it apart.

    Weights, statistics and random numbers are as before; so are the names in the checkpoint.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # the compilation and that step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        start = time.perf_counter()
        data = trainer.datamodule
        shape = (data.batch_size, *data.source.train.images.shape[1:])
        images = torch.zeros(shape, dtype=torch.uint8, device=module.device)
        state = {name: value.clone() for name, value in module.network.state_dict().items()}
        module.network.compile()
        with torch.random.fork_rng():
            with trainer.precision_plugin.forward_context():
                logits = module(images.contiguous(memory_format=module.memory_format))
            logits.sum().backward()
        module.zero_grad()
        module.network.load_state_dict(state)
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.seconds = time.perf_counter() - start
        print(f"Compiled the network in {self.seconds:.1f} s.", flush=True)


class Prune(Callback):
    """Tells an Optuna trial the validation accuracy of each epoch, and stops where its study's pruner says so.

    Raises:
        Pruned: it is not worth going on.
    """

    def __init__(self, trial: "Trial") -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch, accuracy = trainer.current_epoch + 1, module.means("val")["val/accuracy"]
        self.trial.report(accuracy, epoch)
        if epoch < trainer.max_epochs and self.trial.should_prune():
            raise Pruned(f"after epoch {epoch} of {trainer.max_epochs}, validation accuracy {accuracy:.2%}")


class Freeze(Callback):
    """A part of the network learns no more from an epoch on: its backward pass is left out (Brock et al., 2017,
    https://arxiv.org/abs/1706.04983).

    Args:
        part: its name in the network, such as "blocks.0".
        epoch: the first epoch, from 1, in which it stays as it is.

    Raises:
        UserError: the network has no such part.
    """

    def __init__(self, part: str, epoch: int) -> None:
        self.part = part
        self.epoch = epoch

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # a run that is resumed in the middle of an epoch does not start it

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        try:
            part = module.network.get_submodule(self.part)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.network.named_children())
            raise UserError(
                f"callbacks: there is no part {self.part!r} to freeze; the network has {names} ({error})."
            ) from error
        part.requires_grad_(trainer.current_epoch + 1 < self.epoch)


def _override(key: str, value: str) -> str:
    """`key=value` as a shell and Hydra understand it, whatever characters the value has."""
    if re.fullmatch(r"[\w/.:-]+", value):
        return f"{key}={value}"
    escaped = value.replace("'", "\\'")
    return shlex.quote(f"{key}='{escaped}'")


class StopOnSignal(Callback):
    """Ctrl-C and SIGTERM finish the batch and save `last.ckpt`, from which training goes on bit by bit the same.

    A second signal stops at once.

    Raises:
        Interrupted: after saving; its status is 130 (Ctrl-C) or 143 (SIGTERM).
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._received = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        print("\nFinishing the batch. Once more stops at once, without saving.", file=sys.stderr, flush=True)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # Lightning's own handler for SIGTERM only waits for the epoch's end
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # after an epoch's last batch come validation and its checkpoint: then stop at the next epoch's start
        if self._received and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            if (last := self._last_checkpoint(trainer)) is not None:
                trainer.save_checkpoint(last)
            self._stop(trainer, f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1}")

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._received:
            self._stop(trainer, f"epoch {trainer.current_epoch}, its last batch")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()
        if self._received:
            self._stop(trainer, f"epoch {trainer.current_epoch}, the last one")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    @staticmethod
    def _last_checkpoint(trainer: L.Trainer) -> Path | None:
        """Where `last.ckpt` belongs; None for a run that keeps no checkpoints."""
        checkpoint = trainer.checkpoint_callback
        return None if checkpoint is None else Path(checkpoint.dirpath) / "last.ckpt"

    def _stop(self, trainer: L.Trainer, where: str) -> None:
        assert self._received is not None
        message = f"Stopped by {signal.Signals(self._received).name} after {where}."
        if (last := self._last_checkpoint(trainer)) is not None:
            message += f" Go on with:\n  python -m cifarnet.train {_override('ckpt_path', last.as_posix())}"
        raise Interrupted(message, status=128 + self._received)
