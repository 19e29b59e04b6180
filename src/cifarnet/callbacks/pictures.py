"""Pictures of a run, saved in its folder and logged."""

from typing import Annotated, Any, cast

import lightning as L
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.utils import make_grid

from cifarnet.callbacks.loggers import Drawing, log_picture
from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch
from cifarnet.inference import figures
from cifarnet.schema import Range


class Pictures(Drawing):
    """Draws the first augmented batch, predictions on test images, and the confusion matrix.

    Args:
        count: the number of test images to show.
    """

    def __init__(self, count: Annotated[int, Range(1)] = 40) -> None:
        self.count = count

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            grid = make_grid(batch.images[:64].cpu(), nrow=8)
            log_picture(trainer, "train/augmented_batch", grid.permute(1, 2, 0).numpy())

    def draw(self, trainer: L.Trainer, classifier: Classifier) -> None:
        if classifier.test_logits is None or classifier.test_index is None:  # trainer.limit_test_batches=0
            return
        datamodule = cast("Any", trainer).datamodule
        test, class_names = datamodule.source.test, datamodule.class_names
        predicted, index = classifier.test_logits.argmax(1).cpu(), classifier.test_index.cpu()
        # trainer.limit_test_batches may leave fewer than all test images
        shown = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[: self.count]
        images = torch.stack([test.images[i] for i in index[shown].tolist()])
        predictions = figures.predictions(images, test.labels[index[shown]], predicted[shown], class_names)
        matrix = multiclass_confusion_matrix(predicted, test.labels[index], num_classes=len(class_names))
        confusion = figures.confusion(matrix, class_names)
        for name, figure in {"predictions": predictions, "confusion_matrix": confusion}.items():
            log_picture(trainer, f"whole_run/{name}", figures.as_image(figure))
