"""Test-time augmentation: a network's answer as a mean over several views of each image."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cifarnet.errors import UserError


def predict(
    network: Callable[[Tensor], Tensor], images: Tensor, tta: str = "mirror_translate", share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The logits of images [B, C, H, W] as they are, and averaged over their views: twice [B, num_classes].

    - "none": both are the same
    - "mirror": the image and its mirror image
    - "mirror_translate": half of the weight on these two, half on the four that are also shifted by a pixel, up and
      left or down and right, with a reflected border (Jordan, 2024, https://arxiv.org/abs/2404.00498)

    Only the least confident `share` of a batch, from 0 to 1, is looked at again; the others keep the first answer.

    Raises:
        UserError: another `tta`, or a share out of range.
    """
    check(tta, share)
    logits = network(images)
    count = math.ceil(share * len(images))
    if tta == "none" or count == 0:
        return logits, logits
    unsure = logits.softmax(1).amax(1).topk(count, largest=False).indices
    again = images[unsure]
    averaged = logits[unsure] + network(again.flip(3))
    if tta == "mirror_translate":
        shifted = sum(network(view) + network(view.flip(3)) for view in _shifted(again))
        averaged = (averaged + shifted / 2) / 2
    return logits, logits.index_copy(0, unsure, averaged / 2)


def check(tta: str, share: float) -> None:
    """Refuse settings that mean nothing."""
    if tta not in ("none", "mirror", "mirror_translate"):
        raise UserError(f"tta={tta}: choose one of none, mirror, mirror_translate")
    if not 0 <= share <= 1:
        raise UserError(f"tta_share={share}: give a share from 0 to 1")


def _shifted(images: Tensor) -> Iterator[Tensor]:
    """By one pixel, down and right, then up and left; the border is reflected."""
    rows, columns = (torch.arange(-1, size - 1, device=images.device).abs() for size in images.shape[2:])
    yield images[:, :, rows][..., columns]
    yield images[:, :, len(rows) - 1 - rows.flip(0)][..., len(columns) - 1 - columns.flip(0)]
