"""Lookahead: the optimizer's weights go ahead, and slow ones follow."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifarnet.config import Range, checked


class Lookahead(Callback):
    """After every k steps of the optimizer, slow ← slow + alpha (w - slow) and w ← slow (Zhang et al., 2019,
    https://arxiv.org/abs/1907.08610). What is validated and kept are the weights w.

    A recipe for weights: `+recipe=lookahead`.

    Args:
        k: so many steps.
        alpha: how far the slow weights follow.

    Raises:
        UserError: a number out of its range.
    """

    @checked("recipe.lookahead")
    def __init__(self, k: Annotated[int, Range(1, 10**6)] = 5, alpha: Annotated[float, Range(0, 1)] = 0.5) -> None:
        self.k, self.alpha = k, alpha
        self.slow: list[Tensor] = []
        self.step = 0  # of the optimizer, when they last followed

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = list(module.network.parameters())
        self.slow = (
            [slow.to(w.device) for slow, w in zip(self.slow, weights, strict=True)]
            if self.slow
            else [w.clone() for w in weights]
        )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.k == 0 and trainer.global_step > self.step:
            weights, self.step = list(module.network.parameters()), trainer.global_step
            for slow, weight in zip(self.slow, weights, strict=True):
                if weight.requires_grad:  # else it is frozen
                    weight.copy_(slow.lerp_(weight, self.alpha))

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow, self.step = state["slow"], state["step"]
