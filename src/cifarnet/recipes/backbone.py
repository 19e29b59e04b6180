"""Fine-tuning with a smaller learning rate for pretrained layers."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from cifarnet.errors import UserError
from cifarnet.schema import Range

if TYPE_CHECKING:
    from cifarnet.classifier import Classifier


class Backbone(Callback):
    """Scale the learning rate of all layers except the head; with a scale of 0, only the head is trained.

    The head is the network's last linear or convolutional layer. Batch norms in the backbone keep updating their
    statistics.

    Config: `recipe.backbone`, as in `+experiment=finetune`.

    Args:
        lr_scale: the backbone's learning rate as a fraction of the optimizer's, from 0 to 1.

    Raises:
        UserError: the optimizer does not support parameter groups, or the schedule sets the rates of all groups itself.
    """

    def __init__(self, lr_scale: Annotated[float, Range(0, 1)] = 0.1) -> None:
        self.lr_scale = lr_scale

    def setup(self, trainer: L.Trainer, module: "Classifier", stage: str) -> None:
        if stage != "fit" or self.lr_scale == 1:
            return
        head = set(module.network.get_submodule(head_name(module.network)).parameters())
        make_optimizer, make_scheduler = module.make_optimizer, module.make_scheduler

        def scaled_optimizer(parameters: Iterable[Any]) -> Optimizer:
            groups: Any = _split(list(parameters), head)
            optimizer = make_optimizer(groups)
            for group in optimizer.param_groups:
                group["lr"] *= self.lr_scale if group["backbone"] else 1
            return optimizer

        def scaled_scheduler(optimizer: Optimizer, steps: int) -> Any:
            assert make_scheduler is not None
            rates = [group["lr"] for group in optimizer.param_groups]
            scheduler = make_scheduler(optimizer, steps)
            if [group["initial_lr"] for group in optimizer.param_groups] != rates:
                raise UserError(
                    f"scheduler={type(scheduler).__name__} sets the learning rate of every layer itself. With "
                    "recipe.backbone, use another scheduler, such as warmup_cosine, or set recipe.backbone=null."
                )
            return scheduler

        module.make_optimizer = scaled_optimizer
        module.make_scheduler = None if make_scheduler is None else scaled_scheduler


def head_name(network: nn.Module) -> str:
    """Return the name of the layer that outputs the logits: the last linear or convolutional layer.

    Raises:
        UserError: there is no such layer.
    """
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not names:
        remedy = "Add one, or remove recipe.backbone, start.checkpoint, callbacks.embeddings, ood and features"
        raise UserError(f"The network has no Linear or Conv2d layer that could be its head. {remedy}.")
    return names[-1]


@contextlib.contextmanager
def head_inputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect features, the inputs of the network's head, during forward passes: float32 [B, D] each, on the CPU.

    A compiled network ignores the hook that collects them.

    Raises:
        UserError: the network has no head.
    """
    inputs: list[Tensor] = []
    head = network.get_submodule(head_name(network))

    def collect(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # a copy, because the input may be a small view, such as one token of many
        inputs.append(arguments[0].flatten(1).to("cpu", torch.float32, copy=True))

    hook = head.register_forward_pre_hook(collect)
    try:
        yield inputs
    finally:
        hook.remove()


def _split(parameters: list[Tensor] | list[dict[str, Any]], head: set[nn.Parameter]) -> list[dict[str, Any]]:
    """Split each parameter group into a group for the backbone and a group for the head."""
    groups: list[Any] = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
    parts = []
    for group in groups:
        for backbone in (True, False):
            params = [parameter for parameter in group["params"] if (parameter not in head) == backbone]
            if params:
                parts.append(group | {"params": params, "backbone": backbone})
    return parts
