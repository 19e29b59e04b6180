"""Test-time augmentation: logits averaged over several views of each image."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from cifarnet.system.distributed import all_gather, rank, world_size

TTA = Literal["none", "mirror", "mirror_translate"]


class AveragedLogits:
    """The logits of a test set, which are averaged over views for the least confident images.

    The views of `tta` are:

    - "none": the image
    - "mirror": the image and its mirror image
    - "mirror_translate": these two views with half of the weight; the other half is for both views shifted by one
      pixel, up and left, and down and right, with a reflected border (Jordan, 2024, https://arxiv.org/abs/2404.00498)

    The least confident images are known only after the last batch; until then, only images that may be among them are
    stored. Each rank has a part of the test set, and the least confident images are chosen over all ranks.

    Args:
        network: images [B, C, H, W] -> logits [B, num_classes].
        batches: the maximum number of batches over all ranks; the first batch has the maximum size.
        share: the fraction of the images, from 0 to 1, whose logits are averaged over views.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], batches: int, tta: TTA = "mirror_translate", share: float = 1.0
    ) -> None:
        self.network, self.batches = network, batches
        self.tta, self.share = tta, 0.0 if tta == "none" else share
        self.single: list[Tensor] = []  # logits of the images themselves [B, num_classes], per batch
        self._averaged: list[Tensor] = []  # the final logits, if share is 1
        self._candidates: list[tuple[Tensor, Tensor, Tensor]] = []  # confidence, index in the test set, image

    def add(self, images: Tensor) -> Tensor:
        """Return the logits of the images themselves, [B, num_classes]."""
        logits = self.network(images)
        start = sum(map(len, self.single))
        self.single.append(logits)
        if self.share == 1:
            self._averaged.append(self._average(images, logits))
        elif self.share > 0:
            index = torch.arange(start, start + len(images), device=images.device)
            self._candidates.append((logits.softmax(1).amax(1), index, images))
            # another rank may have one more image
            most = math.ceil(self.share * (self.batches * len(self.single[0]) + world_size()))
            if sum(len(index) for _, index, _ in self._candidates) > 2 * most:
                self._candidates = [self._least_confident(most)]
        return logits

    def final(self) -> list[Tensor]:
        """Return the final logits [B, num_classes] of each batch; call it after the last batch."""
        if self.share == 0:
            return self.single
        if self.share == 1:
            return self._averaged
        logits, size = torch.cat(self.single), len(self.single[0])
        _, indices, images = self._least_confident(self._count(logits))
        for index, chosen in zip(indices.split(size), images.split(size), strict=True):
            if len(index):
                logits = logits.index_copy(0, index, self._average(chosen, logits[index]))
        return list(logits.split(size))

    def _count(self, logits: Tensor) -> int:
        """Return how many of this rank's images are among the least confident of all ranks."""
        if world_size() == 1:
            return math.ceil(self.share * len(logits))
        confidence = all_gather(logits.softmax(1).amax(1))
        counts = [len(values) for values in confidence]
        ranks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        least = torch.cat(confidence).cpu().argsort(stable=True)[: math.ceil(self.share * sum(counts))]
        return int((ranks[least] == rank()).sum())

    def _least_confident(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the `count` least confident candidates."""
        confidence, index, images = (torch.cat(parts) for parts in zip(*self._candidates, strict=True))
        chosen = confidence.argsort(stable=True)[:count]
        return confidence[chosen], index[chosen], images[chosen]

    def _average(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return the mean logits over the views of images, given the logits of the images themselves."""
        averaged = logits + self.network(images.flip(3))
        if self.tta == "mirror_translate":
            shifted = sum(self.network(view) + self.network(view.flip(3)) for view in _shifted(images))
            averaged = (averaged + shifted / 2) / 2
        return averaged / 2


def _shifted(images: Tensor) -> Iterator[Tensor]:
    """Yield the images shifted by one pixel, down and right, then up and left; the border is reflected."""
    rows, columns = (torch.arange(-1, size - 1, device=images.device).abs() for size in images.shape[2:])
    yield images[:, :, rows][..., columns]
    yield images[:, :, len(rows) - 1 - rows.flip(0)][..., len(columns) - 1 - columns.flip(0)]
