"""Adversarial training: replace each batch by images for which the loss is higher."""

from typing import TYPE_CHECKING, Annotated, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.schema import Range
from cifarnet.seeding import generator
from cifarnet.system.distributed import rank, world_size

if TYPE_CHECKING:
    from cifarnet.classifier import Classifier
    from cifarnet.data.loader import Batch


class Adversarial(Callback):
    """Train on images that projected gradient ascent of the loss has changed, starting from a random change (PGD, Madry
    et al., 2018, https://arxiv.org/abs/1706.06083). All changes are in units of 1/255, and at most `eps` for each pixel
    and channel.

    With `steps=1 step_size=10`, it is "fast" adversarial training (Wong et al., 2020,
    https://arxiv.org/abs/2001.03994). The images are rounded to 8 bits. While they are changed, the network is in eval
    mode, so that batch norm statistics and dropout are those of the training step alone. A step of the optimizer takes
    `steps` more forward and backward passes. The training metrics are those of the changed images.

    Config: `+recipe=adversarial`.

    Args:
        eps: the largest change of a pixel.
        steps: the number of steps of gradient ascent.
        step_size: the change of each pixel in a step.
    """

    def __init__(
        self,
        eps: Annotated[int, Range(1, 255)] = 8,
        steps: Annotated[int, Range(1, 1000)] = 7,
        step_size: Annotated[float, Range(above=0, most=255)] = 2.0,
    ) -> None:
        self.eps, self.steps, self.step_size = eps, steps, step_size

    def on_train_batch_start(self, trainer: L.Trainer, module: "Classifier", batch: "Batch", batch_idx: int) -> None:
        loader, clean = cast("Any", trainer.train_dataloader), batch.images.float()
        # drawn for the batch of all ranks, so that the images do not depend on their number
        random = generator(module.seed, trainer.current_epoch, f"adversarial {batch_idx}")
        noise = torch.rand(loader.batch_size, *clean.shape[1:], generator=random).tensor_split(world_size())[rank()]
        changed = clean + self.eps * (2 * noise.to(clean.device, non_blocking=True) - 1)
        in_training = [layer for layer in module.network.modules() if layer.training]
        module.network.eval()
        for _ in range(self.steps):
            changed = changed.clamp(0, 255).requires_grad_()
            with trainer.precision_plugin.train_step_context():
                _, losses = module.forward_and_loss(batch._replace(images=changed / 255))
            # leaves the gradients of the weights as they are; the factor keeps small ones from vanishing in float16
            (gradient,) = torch.autograd.grad(1024 * losses.sum(), [changed])
            change = changed.detach() - clean + self.step_size * gradient.sign()
            changed = clean + change.clamp(-self.eps, self.eps)
        for layer in in_training:
            layer.training = True
        batch.images.copy_(changed.clamp(0, 255).round())
