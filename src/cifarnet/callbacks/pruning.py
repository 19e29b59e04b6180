"""Stop a trial of a search that is not worth continuing."""

from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import Callback

from cifarnet.classifier import Classifier
from cifarnet.errors import Pruned

if TYPE_CHECKING:
    from optuna import Trial


class Prune(Callback):
    """Reports the validation accuracy of each epoch to an Optuna trial, and stops if the study's pruner
    decides so.

    Args:
        trial: the trial, which trains on a single device.

    Raises:
        Pruned: the trial is not worth continuing.
    """

    def __init__(self, trial: "Trial") -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if trainer.sanity_checking or not trainer.is_last_batch:
            return  # within an epoch; a study would keep the first value that is reported for the epoch
        epoch, accuracy = trainer.current_epoch + 1, pl_module.means("val")["val/accuracy"]
        self.trial.report(accuracy, epoch)
        if epoch < (trainer.max_epochs or 0) and self.trial.should_prune():
            raise Pruned(f"after epoch {epoch} of {trainer.max_epochs}, validation accuracy {accuracy:.2%}")
