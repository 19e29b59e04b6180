"""EMA: the weights that are validated, tested and kept are a moving average."""

from typing import Annotated

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifarnet.ranges import Range, checked


class EMA(WeightAveraging):
    """w̄ ← decay w̄ + (1 - decay) w after every step (Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046),
    of statistics too. Training itself goes on with w.

    Lightning's EMAWeightAveraging, but what is constant stays so to the last bit, and all tensors are averaged at once.

    A recipe for weights: `+recipe=ema`.

    Args:
        decay: some 1 / (1 - decay) steps are averaged: for a run of a thousand steps, take 0.99.

    Raises:
        UserError: a decay that is not from 0 to 1.
    """

    @checked("recipe.ema")
    def __init__(self, decay: Annotated[float, Range(0, below=1)] = 0.999) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
