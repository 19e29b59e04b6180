"""Stop a run whose loss or weights are no longer finite."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.classifier import Classifier
from cifarnet.errors import Diverged

INTERVAL = 100  # batches between checks within an epoch; each check makes the host wait for the GPU


class StopOnDivergence(Callback):
    """Checks the losses and the weights every 100 batches, at the end of an epoch, after a validation and before a
    checkpoint is saved, so that no checkpoint is overwritten by a diverged network.

    `build` adds it to every run, unless `callbacks.nan=null`.

    Raises:
        Diverged: a loss or a weight is infinite or NaN.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch or (batch_idx + 1) % INTERVAL == 0:
            self._check(trainer, pl_module, "train")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module, "val")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer, pl_module, "train")

    def _check(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Check the sum of the losses of this epoch, and all weights. All ranks must call it."""
        assert isinstance(module, Classifier)
        loss = module.total(stage)[0].item()
        are_finite = [weight.isfinite().all() for weight in module.network.parameters()]
        # the scaler of 16-bit gradients skips a step after an overflow and halves its scale, which is 65536 at first
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        is_skipped = stage == "train" and scaler is not None and scaler.get_scale() >= 1
        if torch.stack(are_finite).all() and (is_skipped or abs(loss) < float("inf")):  # false for NaN
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        kept = f" The best checkpoint so far is kept: {best}" if best else ""
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        raise Diverged(
            f"Training diverged in epoch {trainer.current_epoch + 1}: a loss or a weight is infinite or NaN (learning "
            f"rate {rate:.3g}). Start a new run with a smaller optimizer.lr, a warm-up (scheduler=warmup_cosine) or "
            "clipped gradients (+recipe=clip). To find the operation whose gradient is NaN, add "
            f"+trainer.detect_anomaly=true.{kept}"
        )
