"""SAM: update the weights with the gradient at a nearby point where the loss is higher."""

from typing import TYPE_CHECKING, Annotated, Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from cifarnet.errors import UserError
from cifarnet.schema import Range
from cifarnet.system.distributed import world_size

if TYPE_CHECKING:
    from cifarnet.classifier import Classifier


class SAM(Callback):
    """Sharpness-aware minimization (Foret et al., 2021, https://arxiv.org/abs/2010.01412).

    The optimizer updates w with the gradient of the same batch at w + ρ g / ‖g‖, where g is the gradient at w and the
    norm is over all weights. A step takes twice as long. Metrics and the statistics of batch norms are from the first
    forward pass, at w; the second pass draws new dropout masks.

    Config: `+recipe=sam`.

    Args:
        rho: the distance ρ.

    Raises:
        UserError: gradients are accumulated or scaled.
    """

    def __init__(self, rho: Annotated[float, Range(above=0, most=1000)] = 0.05) -> None:
        self.rho = rho
        self.batch: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: "Classifier", batch: Any, batch_idx: int) -> None:
        if (batches := trainer.accumulate_grad_batches) > 1:
            raise UserError(f"recipe.sam does not support trainer.accumulate_grad_batches={batches}. Remove it.")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:  # the scaler scales the gradients
            raise UserError(f"recipe.sam does not support trainer.precision={trainer.precision}. Choose bf16-mixed.")
        self.batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, module: "Classifier", optimizer: Optimizer) -> None:
        weights: list[Tensor] = [weight for weight in module.network.parameters() if weight.grad is not None]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        changed = [*weights, *module.network.buffers()]  # the statistics of batch norms are buffers
        before = [value.detach().clone() for value in changed]
        with torch.no_grad():
            scale = self.rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
            torch._foreach_add_(weights, torch._foreach_mul(gradients, scale))
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            _, losses = module.forward_and_loss(self.batch)
            loss = module.scale_loss(losses.mean(), len(losses))
        # not backward(), for which DistributedDataParallel would wait
        uphill = torch.autograd.grad(loss, weights, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_copy_(changed, before)
            torch._foreach_copy_(gradients, mean_over_ranks(uphill))


def mean_over_ranks(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Average the gradients over all ranks with one all-reduce."""
    if world_size() == 1:
        return gradients
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(joined)
    parts = (joined / world_size()).split([gradient.numel() for gradient in gradients])
    return tuple(part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True))
