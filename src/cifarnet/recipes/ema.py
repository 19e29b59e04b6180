"""EMA: the weights that are validated, tested and kept are a moving average."""

import itertools
from collections import defaultdict
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifarnet.config import Range, checked


class EMA(WeightAveraging):
    """w̄ ← decay w̄ + (1 - decay) w after every step (Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046),
    of statistics too. Training itself goes on with w.

    Lightning's EMAWeightAveraging, but what is constant stays so to the last bit, all tensors are averaged at once, and
    no step waits for a GPU to say how many there were before.

    A recipe for weights: `+recipe=ema`.

    Args:
        decay: some 1 / (1 - decay) steps are averaged: for a run of a thousand steps, take 0.99.

    Raises:
        UserError: a decay that is not from 0 to 1.
    """

    @checked("recipe.ema")
    def __init__(self, decay: Annotated[float, Range(0, below=1)] = 0.999) -> None:
        super().__init__()
        self._average = get_ema_multi_avg_fn(decay)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self._latest_update_step:
            kinds: dict[torch.dtype, tuple[list, list]] = defaultdict(lambda: ([], []))
            every = (itertools.chain(of.parameters(), of.buffers()) for of in (self._average_model.module, module))
            for averaged, value in zip(*every, strict=True):
                kinds[value.dtype][0].append(averaged.detach())
                kinds[value.dtype][1].append(value.detach())
            for averages, values in kinds.values():
                if self._latest_update_step == 0:
                    torch._foreach_copy_(averages, values)
                else:
                    self._average(averages, values, None)
            self._average_model.n_averaged += 1
            self._latest_update_step = trainer.global_step
