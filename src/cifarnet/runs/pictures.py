"""Pictures of a run, for TensorBoard and its folder."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.utils import make_grid

from cifarnet.evaluation import figures


class Pictures(Callback):
    """What a table of numbers hides: the augmented batch, predictions with mistakes, the confusion matrix.

    All go to TensorBoard (where it is the logger); the predictions also to `predictions.png`.

    Args:
        count: how many test pictures are shown.
    """

    def __init__(self, count: int = 40) -> None:
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
        figure = figures.predictions(images, test.labels[shown], predicted[shown], class_names)
        figure.savefig(Path(trainer.default_root_dir) / "predictions.png")
        writer = _writer(trainer)
        if writer is not None:
            matrix = multiclass_confusion_matrix(predicted, test.labels[:tested], num_classes=len(class_names))
            for name, drawn in [("predictions", figure), ("confusion_matrix", figures.confusion(matrix, class_names))]:
                writer.add_image(f"test/{name}", figures.as_image(drawn), trainer.current_epoch)


def _writer(trainer: L.Trainer) -> SummaryWriter | None:
    return trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None
