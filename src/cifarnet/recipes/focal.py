"""Focal loss: images that are known already count less."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.schema import Range


class FocalLoss(nn.Module):
    """(1 - p)^γ × cross-entropy, with p the probability that the network gives the image's label (Lin et al., 2017,
    https://arxiv.org/abs/1708.02002).

    A recipe for the objective: `objective=focal`.

    Args:
        gamma: γ; with 0 it is the cross-entropy.
        label_smoothing: of the cross-entropy, as torch has it.

    Raises:
        UserError: a gamma below 0.
    """

    def __init__(self, gamma: Annotated[float, Range(0, 100)] = 2.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, num_classes], labels int64 [B] -> each image's loss [B]."""
        known = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        unknown = (1 - known).clamp_min(1e-6)  # at 0 the gradient of a γ below 1 is infinite
        return unknown**self.gamma * losses
