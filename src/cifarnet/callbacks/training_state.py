"""The state of training that Lightning does not save, so that a resumed run matches an uninterrupted one."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from cifarnet.callbacks import checkpoint_files
from cifarnet.callbacks.stopping import StopOnSignal
from cifarnet.classifier import Classifier
from cifarnet.data.datamodule import BATCH, check_batch
from cifarnet.data.loader import Batch, BatchLoader
from cifarnet.errors import UserError
from cifarnet.optim.schedules import batches_per_step
from cifarnet.system.checkpoint_io import check_state
from cifarnet.system.distributed import all_gather, rank, world_size


class TrainingState(Callback):
    """Passes the losses of each batch to the loader, and saves the state that is needed to resume within an epoch: the
    position of the loader, the sums of the metrics, and, for every rank, the state of torch's random generators and the
    gradients that are being accumulated.

    With accumulation, a step uses the mean gradient of the batches since the previous step; at the end of an epoch,
    these can be fewer than `accumulate_grad_batches`.

    When training ends, `last.ckpt` is saved once more, and a run that resumes from it is only tested.

    `build` adds it to every run as the first callback, because others may save a checkpoint at the end of a batch.
    """

    def __init__(self) -> None:
        self.loader: BatchLoader | None = None
        self.module: Classifier | None = None
        self.restored: dict[str, Any] | None = None
        self.is_checked = False  # whether the states of all callbacks can be saved
        self.ended: int | None = None  # the maximum number of epochs, once training has ended

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            checkpoint_files.check_names(trainer)
            untyped: Any = trainer
            # a signal stops the run after all other callbacks have processed the batch
            untyped.callbacks = sorted(untyped.callbacks, key=lambda one: isinstance(one, StopOnSignal))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.restored and self.restored.get("ended") == trainer.max_epochs:
            trainer.should_stop = True  # even if a callback ended training early

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if not isinstance(loader := trainer.train_dataloader, BatchLoader):
            remedy = "use cifarnet.data.InMemoryLoader(images, labels, batch_size, train=True)"
            raise UserError(f"{type(loader).__name__} is not a loader that yields {BATCH}: {remedy}.")
        self.module, self.loader = pl_module, loader
        if self.restored is None:
            return
        self.loader.restore(self.restored["loader"])
        sums: list[Tensor] = self.restored["train_sums"]  # of each rank
        own = sums[rank()] if len(sums) == world_size() else torch.stack(sums).sum(0) * (rank() == 0)
        self.module.sums["train"] = own.to(self.module.device)
        generators = self.restored["generators"]
        if rank() < len(generators):
            torch.set_rng_state(generators[rank()]["cpu"].cpu())
            if self.module.device.type == "cuda" and "cuda" in generators[rank()]:
                torch.cuda.set_rng_state(generators[rank()]["cuda"].cpu(), self.module.device)
        else:  # the previous session had fewer ranks
            self.module.seed_epoch()
        for name, gradients in self.restored.get("gradients", {}).items():
            had_these_ranks = len(gradients) == world_size()
            gradient = gradients[rank()] if had_these_ranks else torch.stack(gradients).mean(0)
            self.module.network.get_parameter(name).grad = gradient.to(self.module.device)
        for callback in checkpoint_files.model_checkpoints(trainer):  # they save once for each step of the optimizer
            callback._last_global_step_saved = self.restored.get("saved_steps", {}).get(callback.state_key, 0)
        self.restored = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.is_checked:  # once, after all callbacks have started
            callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            for part in [*callbacks, *(config.scheduler for config in trainer.lr_scheduler_configs)]:
                if part is not self:
                    check_state(part)
            self.is_checked = True
        loader: Any = trainer.train_dataloader
        if self.loader is not None and loader is not self.loader:  # trainer.reload_dataloaders_every_n_epochs
            loader.restore(self.loader.position())
            self.loader = loader

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if (found := check_batch(batch).images.dtype) != torch.uint8:
            raise UserError(f"The loader yields {found} images. Convert them: (255 * images).round().to(torch.uint8)")
        # Lightning does not call GradientAccumulationScheduler if a run resumes within an epoch
        trainer.accumulate_grad_batches = batches_per_step(trainer, trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        # Lightning has divided each loss by `size`, but the last step of an epoch can have fewer batches
        size = trainer.accumulate_grad_batches
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready % size or size
        for parameter in module.parameters() if batches < size else ():
            if parameter.grad is not None:
                parameter.grad *= size / batches

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.loader is not None and self.loader.selects:
            self.loader.observe(batch.index, outputs["losses"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended = trainer.max_epochs
        checkpoint_files.copy_best(trainer)
        last = checkpoint_files.last_checkpoint(trainer)
        if trainer.strategy.broadcast(last is not None and last.is_file()):
            trainer.save_checkpoint(str(last))

    def state_dict(self) -> dict[str, Any]:
        if self.loader is None or self.module is None:
            return {}
        states = {"cpu": all_gather(torch.get_rng_state())}
        if self.module.device.type == "cuda":
            states["cuda"] = all_gather(torch.cuda.get_rng_state(self.module.device))
        trainer = self.module.trainer
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        accumulates = ready % trainer.accumulate_grad_batches > 0 and not trainer.is_last_batch
        parameters = self.module.network.named_parameters() if accumulates else ()
        saving = checkpoint_files.model_checkpoints(trainer)
        return {
            "ended": self.ended,
            "saved_steps": {callback.state_key: callback._last_global_step_saved for callback in saving},
            "gradients": {name: all_gather(value.grad) for name, value in parameters if value.grad is not None},
            "loader": self.loader.position(),
            "train_sums": all_gather(self.module.sums["train"]),
            "generators": [dict(zip(states, one_rank, strict=True)) for one_rank in zip(*states.values(), strict=True)],
        }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.ended is not None:  # Lightning has already counted the next epoch
            checkpoint["epoch"] -= 1

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._validate_first(checkpoint)
        self._find_files(checkpoint_files.folder(trainer), checkpoint)

    @staticmethod
    def _validate_first(checkpoint: dict[str, Any]) -> None:
        """Validate before the next batch if a validation was due. Lightning does so only if it had begun."""
        progress = checkpoint["loops"]["fit_loop"]
        total = progress["epoch_loop.batch_progress"]["total"]
        if total["completed"] < total["processed"]:  # saved at the end of a batch
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["epoch_loop.val_loop.batch_progress"] |= {"total": begun, "current": dict.fromkeys(begun, 0)}

    @staticmethod
    def _find_files(folder: Path, checkpoint: dict[str, Any]) -> None:
        """Replace the recorded paths of the run's checkpoints with the files in the run's folder.

        The run's folder may have been moved. No path is used from the checkpoint, because Lightning removes the files
        that these paths name.
        """
        files = {path for path in folder.rglob("*.ckpt") if path.is_file() and not path.is_symlink()}

        def moved(path: str) -> str:
            file = folder / path.rpartition("/checkpoints/")[2]
            return str(file) if file in files else ""

        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[name] = moved(state.get(name, ""))
                state["dirpath"] = str(folder)
                scores = {moved(path): score for path, score in state["best_k_models"].items()}
                state["best_k_models"] = {path: score for path, score in scores.items() if path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict or None
