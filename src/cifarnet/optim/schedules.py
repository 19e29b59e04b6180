"""Learning-rate schedules whose phases are fractions of a run."""

import math
from collections.abc import Sequence
from typing import Annotated

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cifarnet.schema import Range

Fraction = Annotated[float, Range(0, 1)]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter, 2016, https://arxiv.org/abs/1608.03983;
    warm-up: Goyal et al., 2017, https://arxiv.org/abs/1706.02677).

    Args:
        total_steps: the number of steps of the whole run.
        warmup: the fraction of the steps during which the rate rises.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: Fraction = 0.05) -> None:
        warmup_steps = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

        super().__init__(optimizer, factor)


class Steps(LambdaLR):
    """Multiply the learning rate by `gamma` at each milestone (He et al., 2015, https://arxiv.org/abs/1512.03385).

    Args:
        total_steps: the number of steps of the whole run.
        milestones: the milestones as fractions of the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[Fraction] = (0.5, 0.75),
        gamma: Annotated[float, Range(above=0)] = 0.1,
    ) -> None:
        steps = [round(part * total_steps) for part in milestones]
        super().__init__(optimizer, lambda step: gamma ** sum(step >= at for at in steps))
