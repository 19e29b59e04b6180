"""Focal loss: images that the network already classifies well have a smaller weight."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.schema import Range


class FocalLoss(nn.Module):
    """(1 - p)^γ × cross-entropy, where p is the predicted probability of the label (Lin et al., 2017,
    https://arxiv.org/abs/1708.02002).

    Config: `objective=focal`.

    Args:
        gamma: γ; 0 gives the cross-entropy.
        label_smoothing: as in torch's cross-entropy.
    """

    def __init__(self, gamma: Annotated[float, Range(0, 100)] = 2.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image, [B], for logits [B, num_classes] and labels int64 [B]."""
        prob = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        weight = (1 - prob).clamp_min(1e-6) ** self.gamma  # at 0 the gradient is infinite for γ below 1
        return weight * losses
