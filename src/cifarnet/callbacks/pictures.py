"""Pictures of a run, for its folder and its loggers."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.utils import make_grid

from cifarnet.callbacks.loggers import log_picture
from cifarnet.inference import figures


class Pictures(Callback):
    """What a table of numbers hides: the augmented batch, predictions with mistakes, the confusion matrix.

    All are files in the run's folder, and go to its loggers.

    Args:
        count: how many test pictures are shown.
    """

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            grid = make_grid(batch[0][:64].cpu(), nrow=8)
            log_picture(trainer, "train/augmented_batch", grid.permute(1, 2, 0).numpy())

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        test, class_names = trainer.datamodule.source.test, trainer.datamodule.class_names
        predicted, index = module.test_logits.argmax(1).cpu(), module.test_index.cpu()
        # fewer than all under trainer.limit_test_batches
        shown = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[: self.count]
        images = torch.stack([test.images[i] for i in index[shown].tolist()])
        figure = figures.predictions(images, test.labels[index[shown]], predicted[shown], class_names)
        matrix = multiclass_confusion_matrix(predicted, test.labels[index], num_classes=len(class_names))
        for name, drawn in [("predictions", figure), ("confusion_matrix", figures.confusion(matrix, class_names))]:
            log_picture(trainer, f"whole_run/{name}", figures.as_image(drawn))
