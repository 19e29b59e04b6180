"""What ends a run before its last epoch: a signal, or a search that gives it up."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet import cli
from cifarnet.errors import Interrupted
from cifarnet.system import distributed

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name)]


class StopOnSignal(Callback):
    """Ctrl-C, SIGTERM and SIGUSR2 finish the batch and save `last.ckpt`, from which training goes on bit by bit the
    same.

    A second signal stops at once (in a SLURM job, a second Ctrl-C). What one rank has received, all ranks hear of, and
    stop after the same batch.

    Raises:
        Interrupted: after saving; its status is 130 (Ctrl-C), 143 (SIGTERM) or 140 (SIGUSR2).
    """

    def __init__(self) -> None:
        self._received: int | None = None  # by this process
        self._agreed: int | None = None  # by any rank, and all know
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._received = self._agreed = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_start(trainer, module)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        kills = number != signal.SIGINT and "SLURM_JOB_ID" in os.environ  # SLURM does, some time after it signals twice
        if self._received is None:
            self._received, self._at = number, time.monotonic()
            more = "" if kills else " Once more stops at once, without saving."
            print(f"\nFinishing the batch.{more}", file=sys.stderr, flush=True)
            if distributed.place().size == 1 and not kills:
                self._restore()
        elif not kills and time.monotonic() - self._at > 1:  # else a terminal's, passed on by torchrun
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # Lightning's own handler for SIGTERM only waits for the epoch's end
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else handler)
        self._previous = {}

    def _agree(self, trainer: L.Trainer) -> int | None:
        """The signal that any rank has received. All ranks must ask."""
        self._agreed = self._received
        if trainer.world_size > 1:  # numbers of a CPU: no GPU is waited for
            told = torch.tensor(self._received or 0)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self._agreed = int(told) or None
        return self._agreed

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # after an epoch's last batch come validation and its checkpoint: then stop at the next epoch's start
        if self._agree(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            if (last := self._last_checkpoint(trainer)) is not None:
                trainer.save_checkpoint(last)
            complete = f"{trainer.current_epoch} of {trainer.max_epochs} epochs are complete"
            self._stop(trainer, f"batch {batch_idx + 1} of epoch {trainer.current_epoch + 1}: {complete}")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # the last checkpoint is older where this epoch was not validated
        if self._agree(trainer) and (last := self._last_checkpoint(trainer)) is not None:
            trainer.save_checkpoint(last)

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._agree(trainer):
            self._stop(trainer, f"epoch {trainer.current_epoch}, which is complete")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()
        if self._agree(trainer):
            self._stop(trainer, f"epoch {trainer.current_epoch}, the last one")

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.world_size == 1:
            self._stop_in_test(trainer)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()
        if trainer.world_size > 1:  # several ranks finish it first
            self._stop_in_test(trainer)

    def _stop_in_test(self, trainer: L.Trainer) -> None:
        last = self._last_checkpoint(trainer)
        if self._agree(trainer) and last is not None and last.is_file():  # else the test is finished
            self._restore()
            self._stop(trainer, "training, in the test")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    @staticmethod
    def _last_checkpoint(trainer: L.Trainer) -> Path | None:
        """Where `last.ckpt` belongs; None for a run that keeps no checkpoints."""
        checkpoint = trainer.checkpoint_callback
        return None if checkpoint is None else Path(checkpoint.dirpath) / "last.ckpt"

    def _stop(self, trainer: L.Trainer, where: str) -> None:
        assert self._agreed is not None
        what, command = f"Stopped by {signal.Signals(self._agreed).name} after {where}.", None
        if (last := self._last_checkpoint(trainer)) is not None:
            command = f"python -m cifarnet.train {cli.quoted('ckpt_path', last.as_posix())}"
        raise Interrupted(what, 128 + self._agreed, command)
