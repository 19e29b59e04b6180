"""Lookahead: slow weights follow the fast weights of the optimizer."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifarnet.schema import Range


class Lookahead(Callback):
    """After every k steps of the optimizer, slow ← slow + alpha (w - slow) and w ← slow (Zhang et al., 2019,
    https://arxiv.org/abs/1907.08610).

    The weights w are validated and saved.

    Config: `+recipe=lookahead`.

    Args:
        k: the number of steps between two updates of the slow weights.
        alpha: the step size of the slow weights.
    """

    def __init__(self, k: Annotated[int, Range(1, 10**6)] = 5, alpha: Annotated[float, Range(0, 1)] = 0.5) -> None:
        self.k, self.alpha = k, alpha
        self.slow: list[Tensor] = []
        self.step = 0  # the optimizer's step at the last update of the slow weights

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = list(module.parameters())
        start = self.slow or [weight.clone() for weight in weights]  # `self.slow` was read from a checkpoint
        self.slow = [slow.to(weight.device) for slow, weight in zip(start, weights, strict=True)]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.k == 0 and trainer.global_step > self.step:
            self.step = trainer.global_step
            for slow, weight in zip(self.slow, module.parameters(), strict=True):
                if weight.requires_grad:  # frozen weights do not change
                    weight.copy_(slow.lerp_(weight, self.alpha))

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow, self.step = state["slow"], state["step"]
