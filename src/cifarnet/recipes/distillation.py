"""Distillation: the network also learns from the probabilities that a trained network (the teacher) predicts."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.schema import Range


class Teacher:
    """loss ← (1 - weight) loss + weight T² KL(teacher ‖ student), where T divides the logits of both before the softmax
    (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

    The teacher sees the same images as the student, including mixed ones. It is not an nn.Module, so that the
    classifier neither saves nor trains its weights.

    Config: `module.teacher`, as in `+recipe=distillation`.

    Args:
        checkpoint: a run's folder or a checkpoint file; its classes and image size must match the data.
        temperature: T; higher values give less likely classes more weight.
        weight: the weight of the teacher's term; with 1, the labels have no effect.

    Attributes:
        network: the trained network in eval mode, which `build` loads.
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
        return self  # weight averaging copies the classifier

    def __call__(self, losses: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Return the losses [B] with the teacher's term.

        Args:
            losses: the student's losses, [B].
            logits: the student's logits, [B, num_classes].
            images: the images, uint8 [B, C, H, W].
        """
        if self.device != images.device:  # at the first call
            self.network, self.device = self.network.to(images.device), images.device
        with torch.no_grad():
            teacher = F.log_softmax(self.network(images).float() / self.temperature, 1)
        student = F.log_softmax(logits / self.temperature, 1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return (1 - self.weight) * losses + self.weight * self.temperature**2 * divergence
