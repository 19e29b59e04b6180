"""What torch's schedules lack: to be planned as parts of a run whose number of steps is given."""

import math
from collections.abc import Sequence
from typing import Annotated

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cifarnet.schema import Range

Part = Annotated[float, Range(0, 1)]


class WarmupCosine(LambdaLR):
    """Straight up to the optimizer's rate, then half a cosine down to nothing (Loshchilov and Hutter, 2016,
    https://arxiv.org/abs/1608.03983; warm-up: Goyal et al., 2017, https://arxiv.org/abs/1706.02677).

    Args:
        total_steps: of the whole run.
        warmup: the part of them in which the rate goes up.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: Part = 0.05) -> None:
        rising = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - rising) / max(1, total_steps - rising)))

        super().__init__(optimizer, factor)


class Steps(LambdaLR):
    """The optimizer's rate, multiplied by `gamma` at each of some moments (He et al., 2015,
    https://arxiv.org/abs/1512.03385).

    Args:
        total_steps: of the whole run.
        milestones: the moments, as parts of it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[Part] = (0.5, 0.75),
        gamma: Annotated[float, Range(above=0)] = 0.1,
    ) -> None:
        moments = [round(part * total_steps) for part in milestones]
        super().__init__(optimizer, lambda step: gamma ** sum(step >= moment for moment in moments))
