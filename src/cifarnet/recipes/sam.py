"""SAM: the gradient is not taken where the weights are, but a step further up."""

from collections.abc import Sequence
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from cifarnet.config import Range, checked
from cifarnet.errors import UserError
from cifarnet.system.distributed import world_size


class SAM(Callback):
    """Sharpness-aware minimisation: the optimizer steps from w by the gradient of the same batch at w + ρ g / ‖g‖, with
    g that at w and the norm over all weights (Foret et al., 2021, https://arxiv.org/abs/2010.01412). A step takes
    twice the time. Metrics and batch norms' statistics are those of the look at w; dropout draws anew for the other.

    A recipe for weights: `+recipe=sam`.

    Args:
        rho: ρ, how far it climbs.

    Raises:
        UserError: a rho that is not above 0; gradients are accumulated, or scaled.
    """

    @checked("recipe.sam")
    def __init__(self, rho: Annotated[float, Range(above=0, most=1000)] = 0.05) -> None:
        self.rho = rho
        self.batch: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if (batches := trainer.accumulate_grad_batches) > 1:
            raise UserError(f"recipe.sam climbs once a batch: leave out trainer.accumulate_grad_batches={batches}.")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(f"recipe.sam: trainer.precision={trainer.precision} scales gradients. Choose bf16-mixed.")
        self.batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        weights = [weight for weight in module.network.parameters() if weight.grad is not None]  # not the frozen ones
        gradients = [weight.grad for weight in weights]
        changed = [*weights, *module.network.buffers()]  # a batch norm's statistics are buffers
        before = [value.detach().clone() for value in changed]
        with torch.no_grad():
            scale = self.rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
            torch._foreach_add_(weights, torch._foreach_mul(gradients, scale))
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            _, losses = module.forward_and_loss(self.batch)
            loss = module.scale_loss(losses.mean(), len(losses))
        # not by backward, whose gradients DistributedDataParallel would wait for
        found = torch.autograd.grad(loss, weights, materialize_grads=True)
        with torch.no_grad():
            for value, former in zip(changed, before, strict=True):
                value.copy_(former)
            torch._foreach_copy_(gradients, averaged(found))


def averaged(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Their means over all ranks."""
    if (ranks := world_size()) == 1:
        return gradients
    whole = torch.cat([gradient.flatten() for gradient in gradients])  # asked for at once
    torch.distributed.all_reduce(whole)
    parts = (whole / ranks).split([gradient.numel() for gradient in gradients])
    return [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
