"""SWA: the weights that are validated, tested and kept are the mean of those at the ends of the last epochs."""

from collections.abc import Sequence
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from cifarnet.config import Range, checked


class SWA(WeightAveraging):
    """The mean of the weights at the ends of all epochs from `epoch` on (Izmailov et al., 2018,
    https://arxiv.org/abs/1803.05407); before, those of the last epoch. A batch norm's statistics are averaged too,
    where the paper gathers them anew. Rates that stay high suit it, such as scheduler=constant.

    A recipe for weights: `+recipe=swa`.

    Args:
        epoch: the first epoch, from 1, whose weights are averaged.

    Raises:
        UserError: an epoch below 1.
    """

    @checked("recipe.swa")
    def __init__(self, epoch: Annotated[int, Range(1, 10**9)]) -> None:
        super().__init__(multi_avg_fn=mean)
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.is_last_batch:
            if trainer.current_epoch + 1 <= self.epoch:
                self._average_model.n_averaged.zero_()  # begin anew: with a copy
            self._average_model.update_parameters(module)


@torch.no_grad()
def mean(averaged: Sequence[Tensor], values: Sequence[Tensor], count: Tensor) -> None:
    """Averages of `count` values take one more; whole numbers, which torch fails to divide on a GPU, become it."""
    if averaged[0].is_floating_point():
        torch._foreach_lerp_(averaged, values, 1 / (int(count) + 1))
    else:
        torch._foreach_copy_(averaged, values)
