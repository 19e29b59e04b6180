"""SWA: validate, test and save the mean of the weights at the ends of the last epochs."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from cifarnet.schema import Range

Tensors = tuple[Tensor, ...] | list[Tensor]


class SWA(WeightAveraging):
    """The mean of the weights at the ends of all epochs from `epoch` on (Izmailov et al., 2018,
    https://arxiv.org/abs/1803.05407).

    Before `epoch`, the latest weights are used. The statistics of batch norms are also averaged; the paper recomputes
    them. Use SWA with a learning rate that stays high, such as scheduler=constant.

    Config: `+recipe=swa`.

    Args:
        epoch: the first epoch, counted from 1, whose weights are averaged.
    """

    def __init__(self, epoch: Annotated[int, Range(1, 10**9)]) -> None:
        super().__init__(multi_avg_fn=update_mean)
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not trainer.is_last_batch:
            return
        assert self._average_model is not None
        if trainer.current_epoch + 1 <= self.epoch:
            self._average_model.n_averaged.zero_()  # start with a copy of the weights
        self._average_model.update_parameters(module)


@torch.no_grad()
def update_mean(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
    """Update averages of `count` values with new values; integers, which torch cannot divide on a GPU, are copied."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, values, 1 / (int(count) + 1))
    else:
        torch._foreach_copy_(averages, values)
