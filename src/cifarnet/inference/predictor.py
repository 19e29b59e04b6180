"""A trained network at work: the arithmetic of training's test, without a Trainer."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from cifarnet.errors import UserError
from cifarnet.models import tta as test_time
from cifarnet.system.log_output import quiet_fabric


class Predictions(NamedTuple):
    """Of N images: logits of one view, and with test-time augmentation, float32 [N, num_classes]; labels, and which
    image of its split each is, int64 [N]."""

    one_view: Tensor
    logits: Tensor
    labels: Tensor
    index: Tensor


class Predictor:
    """Batches of images in, logits out, in the precision and on the device that are asked for.

    Args:
        network: images [B, C, H, W] -> logits [B, num_classes], in eval mode.
        tta, tta_share, channels_last: as of `Classifier`.
        precision, accelerator: as of Lightning's Trainer.

    Raises:
        UserError: the device or the precision cannot be had.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        tta: str = "none",
        tta_share: float = 1.0,
        channels_last: bool = True,
        precision: str = "32-true",
        accelerator: str = "auto",
    ) -> None:
        test_time.check(tta, tta_share)
        try:
            with quiet_fabric():
                fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
        except Exception as error:  # Lightning raises many types for settings it cannot use
            raise UserError(
                f"accelerator={accelerator} precision={precision}: {error} Try accelerator=cpu or precision=32-true."
            ) from error
        self.tta, self.tta_share, self.device = tta, tta_share, fabric.device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = fabric.setup_module(network.to(memory_format=self.memory_format))

    def _forward(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous(memory_format=self.memory_format)).float()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of images [B, C, H, W] from one view, and with test-time augmentation: twice [B, num_classes]."""
        answers = test_time.AveragedLogits(self._forward, 1, self.tta, self.tta_share)
        return answers.add(images.to(self.device)), answers.final()[0]

    @torch.inference_mode()
    def over(self, batches: Collection[Sequence[Tensor]], title: str) -> Predictions:
        """The answers, on the CPU, to all batches of (images, labels, index, …). A bar shows the way on a terminal."""
        answers, rest = test_time.AveragedLogits(self._forward, len(batches), self.tta, self.tta_share), []
        for images, labels, index, *_ in tqdm(batches, title, leave=False, disable=None):
            answers.add(images.to(self.device))
            rest.append((labels.cpu(), index.cpu()))
        logits = [torch.cat(batch).cpu() for batch in (answers.single, answers.final())]
        return Predictions(*logits, *(torch.cat(part) for part in zip(*rest, strict=True)))
