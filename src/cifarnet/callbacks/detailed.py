"""What `callbacks=detailed` adds to TensorBoard. None of these callbacks changes a result."""

import copy
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import Optimizer

from cifarnet.callbacks.loggers import Drawing
from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError, on_one_line, reason
from cifarnet.recipes.backbone import head_inputs, head_name
from cifarnet.schema import Range


def writers(trainer: L.Trainer) -> Iterator[Any]:
    """Yield the `SummaryWriter` of each TensorBoard logger; on ranks other than 0, it writes nothing."""
    return (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


class Graph(Callback):
    """Draws the graph of the network, once."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        for writer in writers(trainer) if trainer.global_step == batch_idx == 0 else ():
            network = copy.deepcopy(cast("Classifier", module).network).eval().cpu()  # tracing changes nothing
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # branches of the network that depend on the image size
                    writer.add_graph(network, batch.images[:1].cpu())
            except (RuntimeError, torch.jit.TracingCheckError) as error:
                raise UserError(f"callbacks.graph: cannot trace: {reason(error)}. Set callbacks.graph=null.") from error


class Histograms(Callback):
    """Draws histograms of each parameter and of its gradient after the last step of every epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for writer in writers(trainer) if trainer.is_last_batch else ():  # the validation removes the gradients
            for name, weights in cast("Classifier", module).network.named_parameters():
                for group, values in {"weights": weights, "gradients": weights.grad}.items():
                    if values is not None and values.isfinite().all():  # TensorBoard refuses other values
                        writer.add_histogram(f"{group}/{name}", values.detach().float(), trainer.current_epoch + 1)


class GradientNorm(Callback):
    """Logs the norm of all gradients before clipping, at each step or every `trainer.log_every_n_steps` steps."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        every: int = cast("Any", trainer).log_every_n_steps
        for writer in writers(trainer) if every and trainer.global_step % every == 0 else ():
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                norm /= scaler.get_scale()  # a fused optimizer divides the gradients in its step
            writer.add_scalar("train/gradient_norm", norm, trainer.global_step)


class PRCurves(Drawing):
    """Draws the precision-recall curve of each class against all others, on the test images."""

    def draw(self, trainer: L.Trainer, classifier: Classifier) -> None:
        if classifier.test_logits is None or classifier.test_index is None:  # trainer.limit_test_batches=0
            return
        data = cast("Any", trainer).datamodule
        probabilities, labels = classifier.test_logits.cpu().softmax(1), data.source.test.labels
        is_class = F.one_hot(labels[classifier.test_index.cpu()], len(data.class_names))
        for writer in writers(trainer):
            for number, name in enumerate(data.class_names):
                curve = is_class[:, number], probabilities[:, number]
                writer.add_pr_curve(f"whole_run/{name}", *curve, global_step=trainer.current_epoch)


class Embeddings(Drawing):
    """Shows test images in TensorBoard's projector at the positions of their embeddings, the inputs of the last layer.

    Args:
        count: the number of images.
    """

    def __init__(self, count: Annotated[int, Range(1)] = 1000) -> None:
        self.count = count

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        head_name(cast("Classifier", module).network)  # raises its error before training

    def draw(self, trainer: L.Trainer, classifier: Classifier) -> None:
        if classifier.test_logits is None or classifier.test_index is None:  # trainer.limit_test_batches=0
            return
        data = cast("Any", trainer).datamodule
        network = copy.deepcopy(classifier.network).eval()  # not compiled
        chosen = torch.randperm(len(classifier.test_index), generator=torch.Generator().manual_seed(0))[: self.count]
        shown = data.source.test[classifier.test_index.cpu()[chosen]]
        images = torch.cat(list(shown.chunks()))
        with torch.inference_mode(), head_inputs(network) as inputs:
            for batch in images.split(data.eval_batch_size):
                network(batch.to(classifier.device))
        names = [on_one_line(name) for name in data.class_names]  # metadata.tsv has a line for each image
        predicted = classifier.test_logits.cpu()[chosen].argmax(1).tolist()
        rows = [[names[i], names[j]] for i, j in zip(shown.labels.tolist(), predicted, strict=True)]
        sprites = F.interpolate(images.float() / 255, (32, 32), mode="bilinear", antialias=True)
        for writer in writers(trainer):
            writer.add_embedding(torch.cat(inputs), rows, sprites, tag="test", metadata_header=["class", "predicted"])
