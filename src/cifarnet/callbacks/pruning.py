"""A search that stops a trial which is not worth continuing."""

from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import Pruned

if TYPE_CHECKING:
    from optuna import Trial


class Prune(Callback):
    """Tells an Optuna trial the validation accuracy of each epoch, and stops where its study's pruner says so.

    Of several ranks the first one has the trial; the others have None, and are told.

    Raises:
        Pruned: it is not worth going on.
    """

    def __init__(self, trial: "Trial | None" = None) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # within an epoch: a study keeps the first figure that it is told of each
        epoch, accuracy = trainer.current_epoch + 1, module.means("val")["val/accuracy"]
        prune = False
        if self.trial is not None:
            self.trial.report(accuracy, epoch)
            prune = epoch < trainer.max_epochs and self.trial.should_prune()
        if trainer.strategy.broadcast(prune):
            raise Pruned(f"after epoch {epoch} of {trainer.max_epochs}, validation accuracy {accuracy:.2%}")
