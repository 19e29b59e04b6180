"""Distillation: a trained network, the teacher, says how likely it takes each class to be."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.schema import Range


class Teacher:
    """loss ← (1 - weight) loss + weight T² KL(teacher ‖ student), of probabilities softened by a temperature T: logits
    are divided by it (Hinton et al., 2015, https://arxiv.org/abs/1503.02531). Each image is shown to the teacher as the
    student sees it, mixed ones too.

    No Module: a classifier that has one neither saves its weights nor trains them.

    A recipe for the objective: `module.teacher`, as in `+recipe=distillation`.

    Args:
        checkpoint: a run's folder or a checkpoint file, of the data's classes and image size.
        temperature: T; the higher, the more the classes count that are not the likeliest one.
        weight: of the teacher's part; 0 leaves it out, 1 the labels.

    Attributes:
        network: the trained one, in eval mode; `build` reads it when training is to begin.

    Raises:
        UserError: a number out of its range.
    """

    network: nn.Module

    def __init__(
        self,
        checkpoint: str,
        temperature: Annotated[float, Range(above=0, most=1000)] = 4.0,
        weight: Annotated[float, Range(0, 1)] = 0.5,
    ) -> None:
        self.checkpoint, self.temperature, self.weight = checkpoint, temperature, weight
        self.device = torch.device("cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # averages of weights copy their classifier

    def __call__(self, losses: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Losses [B], the student's logits [B, num_classes], images uint8 [B, C, H, W] -> losses [B]."""
        if self.device != images.device:  # once
            self.network, self.device = self.network.to(images.device), images.device
        with torch.no_grad():
            soft = F.log_softmax(self.network(images).float() / self.temperature, 1)
        own = F.log_softmax(logits / self.temperature, 1)
        distance = F.kl_div(own, soft, reduction="none", log_target=True).sum(1)
        return (1 - self.weight) * losses + self.weight * self.temperature**2 * distance
