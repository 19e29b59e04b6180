"""Stop a run after the current batch when a signal is received, so that it can be resumed."""

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet import cli
from cifarnet.callbacks.checkpoint_files import last_checkpoint
from cifarnet.errors import Interrupted
from cifarnet.system import distributed, signals


class StopOnSignal(Callback):
    """Stops after the current batch on Ctrl-C, SIGTERM and SIGUSR2, and saves `last.ckpt`. The
    resumed run matches an uninterrupted run.

    A second signal stops at once, without saving (in a SLURM job, only a second Ctrl-C). A signal to one rank stops all
    ranks after the same batch.

    Raises:
        Interrupted: after saving; its status is 130 (Ctrl-C), 143 (SIGTERM) or 140 (SIGUSR2).
    """

    def __init__(self) -> None:
        self._received: int | None = None  # the signal that this process received
        self._agreed: int | None = None  # the signal that any rank received, known to all ranks
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received = self._agreed = None
        for number in signals.STOPPING if signals.can_install() else ():
            self._previous[number] = signal.signal(number, self._receive)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # SLURM sends a signal twice before it kills the job; the second one does not stop the run at once
        is_slurms = number != signal.SIGINT and "SLURM_JOB_ID" in os.environ
        if self._received is None:
            self._received, self._received_at = number, time.monotonic()
            hint = "" if is_slurms else " Press Ctrl-C again to stop at once, without saving."
            print(f"\nFinishing the batch.{hint}", file=sys.stderr, flush=True)
            if distributed.placement().world_size == 1 and not is_slurms:
                self._restore_handlers()
        elif not is_slurms and time.monotonic() - self._received_at > 1:  # torchrun repeats a Ctrl-C
            self._restore_handlers()
            os.kill(os.getpid(), number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            # Lightning's handler of SIGTERM waits for the end of the epoch
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else handler)
        self._previous = {}

    def _agree(self, trainer: L.Trainer) -> int | None:
        """Return the signal that any rank has received, or None. All ranks must call it."""
        self._agreed = self._received
        if trainer.world_size > 1:  # a CPU tensor does not wait for the GPU
            number = torch.tensor(self._received or 0)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self._agreed = int(number) or None
        return self._agreed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # after the last batch of an epoch, validate and save the checkpoint first, and stop when the next epoch starts
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if self._agree(trainer) and not ends:
            self._save(trainer)
            complete = f"{trainer.current_epoch} of {trainer.max_epochs} epochs are complete"
            self._stop(trainer, f"batch {batch_idx + 1} of epoch {trainer.current_epoch + 1}: {complete}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._agree(trainer):
            self._save(trainer)  # last.ckpt is older if this epoch was not validated

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._agree(trainer):
            self._stop(trainer, f"epoch {trainer.current_epoch}, which is complete")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()
        if self._agree(trainer):
            self._stop(trainer, f"epoch {trainer.current_epoch}, the last one")

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.world_size == 1:
            self._stop_in_test(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()
        if trainer.world_size > 1:  # several ranks complete the test first
            self._stop_in_test(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _stop_in_test(self, trainer: L.Trainer) -> None:
        last = last_checkpoint(trainer)
        if self._agree(trainer) and last is not None and last.is_file():  # otherwise the test is completed
            self._restore_handlers()
            self._stop(trainer, "training, during the test")

    def _save(self, trainer: L.Trainer) -> None:
        if (last := last_checkpoint(trainer)) is not None:
            trainer.save_checkpoint(last)

    def _stop(self, trainer: L.Trainer, place: str) -> None:
        assert self._agreed is not None
        message, command = f"Stopped by {signal.Signals(self._agreed).name} after {place}.", None
        if (last := last_checkpoint(trainer)) is not None:
            command = f"python -m cifarnet.train {cli.quoted('ckpt_path', last.as_posix())}"
        raise Interrupted(message, 128 + self._agreed, command)
