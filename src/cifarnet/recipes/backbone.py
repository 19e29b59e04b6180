"""A smaller learning rate for what was trained before, in fine-tuning."""

from collections.abc import Iterable
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from cifarnet.config import Range, checked
from cifarnet.errors import UserError


class Backbone(Callback):
    """All of the network but its head learns at a share of the optimizer's rate; at 0 the head alone learns.

    The head is the last layer that is a matrix or a convolution. The other layers' norms keep gathering statistics.

    A recipe for weights: `recipe.backbone`, as in `+experiment=finetune`.

    Args:
        lr_scale: that share, from 0 to 1.

    Raises:
        UserError: the optimizer takes no groups of parameters, or the schedule sets all rates itself.
    """

    @checked("recipe.backbone")
    def __init__(self, lr_scale: Annotated[float, Range(0, 1)] = 0.1) -> None:
        self.lr_scale = lr_scale

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.lr_scale == 1:
            return
        head = {id(parameter) for parameter in module.network.get_submodule(head_of(module.network)).parameters()}
        make_optimizer, make_scheduler, rates = module.make_optimizer, module.make_scheduler, []

        def optimizer(parameters: Iterable[Any]) -> Optimizer:
            try:
                made = make_optimizer(_split(list(parameters), head))
            except UserError as error:
                told = f"{error} With recipe.backbone choose another, such as optimizer=sgd; or recipe.backbone=null."
                raise UserError(told) from error
            for group in made.param_groups:
                group["lr"] *= self.lr_scale if group["backbone"] else 1
            rates.extend(group["lr"] for group in made.param_groups)
            return made

        def scheduler(made: Optimizer, steps: int) -> Any:
            schedule = make_scheduler(made, steps)
            if [group["initial_lr"] for group in made.param_groups] != rates:
                raise UserError(
                    f"scheduler={type(schedule).__name__} sets every part's rate itself. With recipe.backbone "
                    "choose another, such as scheduler=warmup_cosine or linear; or leave it out, recipe.backbone=null."
                )
            return schedule

        module.make_optimizer = optimizer
        module.make_scheduler = scheduler if make_scheduler is not None else None


def head_of(network: nn.Module) -> str:
    """The name of the layer that gives the logits: the last one that is a matrix or a convolution."""
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError("The network has no layer that could be its head: no Linear, and no Conv2d.")
    return layers[-1]


def _split(parameters: list[Tensor] | list[dict[str, Any]], head: set[int]) -> list[dict[str, Any]]:
    """Each group of parameters as two: the backbone's, and the head's."""
    groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
    parts = []
    for group in groups:
        for backbone in (True, False):
            own = [one for one in group["params"] if (id(one) not in head) == backbone]
            parts += [group | {"params": own, "backbone": backbone}] if own else []
    return parts
