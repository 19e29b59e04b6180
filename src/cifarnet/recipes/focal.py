"""Focal loss, which gives less weight to images that the network already classifies well."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.schema import Range


class FocalLoss(nn.Module):
    """The loss (1 - p)^γ × cross-entropy, where p is the predicted probability of the label (Lin et al., 2017,
    https://arxiv.org/abs/1708.02002).

    Config: `objective=focal`.

    Args:
        gamma: γ; with 0, the loss is the cross-entropy.
        label_smoothing: the label smoothing of torch's cross-entropy.
        weight: a weight for each class, float [num_classes] (α in the paper); None: 1.
    """

    weight: Tensor | None

    def __init__(
        self,
        gamma: Annotated[float, Range(0, 100)] = 2.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image, [B], for logits [B, num_classes] and labels int64 [B]."""
        prob = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        losses = F.cross_entropy(logits, labels, self.weight, reduction="none", label_smoothing=self.label_smoothing)
        weight = (1 - prob).clamp_min(1e-6) ** self.gamma  # at 0, the gradient is infinite if γ is below 1
        return weight * losses
