"""Freezing: a part of the network stops learning early."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import UserError


class Freeze(Callback):
    """A part of the network learns no more from an epoch on: its backward pass is left out (Brock et al., 2017,
    https://arxiv.org/abs/1706.04983).

    A recipe for weights: `+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: blocks.0, epoch: 3}`.

    Args:
        part: its name in the network, such as "blocks.0".
        epoch: the first epoch, from 1, in which it stays as it is.

    Raises:
        UserError: the network has no such part.
    """

    def __init__(self, part: str, epoch: int) -> None:
        self.part = part
        self.epoch = epoch

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # a run that is resumed in the middle of an epoch does not start it

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        try:
            part = module.network.get_submodule(self.part)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.network.named_children())
            raise UserError(
                f"recipe: there is no part {self.part!r} to freeze; the network has {names} ({error})."
            ) from error
        part.requires_grad_(trainer.current_epoch + 1 < self.epoch)
