"""EMA: validate, test and save a moving average of the weights."""

from itertools import chain
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifarnet.schema import Range


class EMA(WeightAveraging):
    """w̄ ← decay w̄ + (1 - decay) w after every step (Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046).

    Buffers are also averaged. Training continues with w. Unlike Lightning's EMAWeightAveraging, it averages all tensors
    at once, keeps constant values bit for bit, and never waits for a GPU to count the steps.

    Config: `+recipe=ema`.

    Args:
        decay: the decay; the average covers about 1 / (1 - decay) steps. Use 0.99 for a run of a thousand steps.
    """

    def __init__(self, decay: Annotated[float, Range(0, below=1)] = 0.999) -> None:
        super().__init__()
        self._average = get_ema_multi_avg_fn(decay)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step <= self._latest_update_step:
            return
        assert self._average_model is not None
        networks = (self._average_model.module, module)
        tensors = [[*chain(network.parameters(), network.buffers())] for network in networks]
        for dtype in {tensor.dtype for tensor in tensors[0]}:
            averages, values = ([tensor.detach() for tensor in part if tensor.dtype == dtype] for part in tensors)
            if self._latest_update_step == 0:
                torch._foreach_copy_(averages, values)
            else:
                self._average(averages, values, None)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step
