"""Run a trained network with the precision and the test-time augmentation of the run's test."""

from collections.abc import Iterable, Sequence, Sized
from typing import Annotated, NamedTuple, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from cifarnet.config import check_precision
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.models.tta import TTA, AveragedLogits
from cifarnet.recipes.backbone import head_inputs
from cifarnet.schema import Range, check
from cifarnet.system import distributed
from cifarnet.system.log_output import quiet_fabric


class Batches(Sized, Iterable[Batch], Protocol):
    """A loader or a list of batches."""


class Predictions(NamedTuple):
    """The predictions for N images.

    Attributes:
        one_view: logits without test-time augmentation, float32 [N, num_classes].
        logits: logits with test-time augmentation, float32 [N, num_classes].
        labels: the true classes, int64 [N].
        index: the positions of the images in their data set, int64 [N].
        features: the inputs of the network's last layer, float32 [N, D]; only `Predictor.embed` collects them.
        members: for an ensemble, the logits of each network with test-time augmentation.
    """

    one_view: Tensor
    logits: Tensor
    labels: Tensor
    index: Tensor
    features: Tensor = torch.empty(0)
    members: Sequence[Tensor] = ()


class Predictor:
    """Computes the logits of batches of images.

    Args:
        network: a network in eval mode: images [B, C, H, W] -> logits [B, num_classes].
        tta, tta_share, channels_last: as for `Classifier`.
        precision, accelerator: as for Lightning's Trainer.

    Raises:
        UserError: a setting is unknown, or the device does not exist or does not support the precision.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        tta: TTA = "none",
        tta_share: float = 1.0,
        channels_last: bool = True,
        precision: str | int = "32-true",
        accelerator: str = "auto",
    ) -> None:
        check("tta", tta, TTA)
        check_precision("precision", precision)
        check("tta_share", tta_share, Annotated[float, Range(0, 1)])
        try:
            plugins = [distributed.environment()]  # or else Fabric warns wherever srun is installed
            with quiet_fabric():
                fabric = Fabric(accelerator=accelerator, devices=1, precision=precision, plugins=plugins)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # Lightning raises many types for unsupported settings
            raise UserError(
                f"accelerator={accelerator} precision={precision}: {error} Try accelerator=cpu or precision=32-true."
            ) from error
        self.tta: TTA = tta
        self.tta_share, self.precision, self.device = tta_share, precision, fabric.device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = fabric.setup_module(network.to(memory_format=self.memory_format))

    def _forward(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous(memory_format=self.memory_format)).float()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of images [B, C, H, W], without and with test-time augmentation, each [B, num_classes]."""
        answers = AveragedLogits(self._forward, 1, self.tta, self.tta_share)
        return answers.add(images.to(self.device)), answers.final()[0]

    @torch.inference_mode()
    def predict_all(self, batches: Batches, title: str, tta: TTA | None = None) -> Predictions:
        """Return the predictions for all batches, on the CPU. In a terminal, a progress bar shows the title.

        Args:
            tta: None for the test-time augmentation of the predictor.

        Raises:
            UserError: the network's outputs are not finite.
        """
        answers = AveragedLogits(self._forward, len(batches), tta or self.tta, self.tta_share)
        labels, index = [], []
        for batch in tqdm(batches, title, leave=False, disable=None):
            answers.add(batch.images.to(self.device))
            labels.append(batch.labels.cpu())
            index.append(batch.index.cpu())
        one_view, logits = (torch.cat(parts).cpu() for parts in (answers.single, answers.final()))
        if not logits.isfinite().all():
            raise UserError("The network's outputs are not finite: its training diverged. Try a smaller optimizer.lr.")
        return Predictions(one_view, logits, torch.cat(labels), torch.cat(index))

    def embed(self, batches: Batches, title: str) -> Predictions:
        """Return the predictions without test-time augmentation, and the features of all images, on the CPU.

        Raises:
            UserError: the network has no head.
        """
        with head_inputs(self.network) as inputs:
            predictions = self.predict_all(batches, title, "none")
        return predictions._replace(features=torch.cat(inputs))
