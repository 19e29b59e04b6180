"""Freezing: a part of the network stops learning before the end of training."""

from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import UserError

if TYPE_CHECKING:
    from cifarnet.classifier import Classifier


class Freeze(Callback):
    """Stop training a part of the network at an epoch, which also avoids its backward pass (Brock et al., 2017,
    https://arxiv.org/abs/1706.04983).

    Config: `+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: blocks.0, epoch: 3}`.

    Args:
        part: the name of a submodule of the network, such as "blocks.0".
        epoch: the first epoch, counted from 1, in which the part is frozen.

    Raises:
        UserError: the network has no such submodule.
    """

    def __init__(self, part: str, epoch: int) -> None:
        self.part = part
        self.epoch = epoch

    def on_train_start(self, trainer: L.Trainer, module: "Classifier") -> None:
        self.on_train_epoch_start(trainer, module)  # not called if a run resumes within an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, module: "Classifier") -> None:
        try:
            part = module.network.get_submodule(self.part)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.network.named_children())
            raise UserError(f"recipe: the network has no part={self.part}; its parts are {names}.") from error
        part.requires_grad_(trainer.current_epoch + 1 < self.epoch)
