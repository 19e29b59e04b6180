"""Test-time augmentation: a network's answer as a mean over several views of each image."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from cifarnet.system.distributed import all_gather, world_size

TTA = Literal["none", "mirror", "mirror_translate"]


class Answers:
    """A network's answers to a test set, batch by batch, the least confident `share` of it with another look.

    `tta` says what the answer to an image that is looked at again is the mean of:

    - "none": nothing is looked at again
    - "mirror": the image and its mirror image
    - "mirror_translate": half of the weight on these two, half on the four that are also shifted by a pixel, up and
      left or down and right, with a reflected border (Jordan, 2024, https://arxiv.org/abs/2404.00498)

    Which images are the least confident is known at the end: no more of them are kept until then than may be chosen.
    Several ranks have a part of the test set each, in their order; the least confident are those of all.

    Args:
        network: images [B, C, H, W] -> logits [B, num_classes].
        batches: how many all ranks have at most, of the size of the first one.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], batches: int, tta: TTA = "mirror_translate", share: float = 1.0
    ) -> None:
        self.network, self.batches = network, batches
        self.tta, self.share = tta, share
        self.first: list[Tensor] = []  # logits of one view [B, num_classes], batch by batch
        self._final: list[Tensor] = []  # the last word already, where all or none are looked at again
        self._unsure: list[tuple[Tensor, Tensor, Tensor]] = []  # confidence, place in the test set, image: candidates

    def add(self, images: Tensor) -> Tensor:
        """Logits of one view."""
        logits = self.network(images)
        start = sum(map(len, self.first))
        self.first.append(logits)
        if self.tta == "none" or self.share == 0:
            self._final.append(logits)
        elif self.share == 1:
            self._final.append(self._look_again(images, logits))
        else:
            place = torch.arange(start, start + len(images), device=images.device)
            self._unsure.append((logits.softmax(1).amax(1), place, images))
            # other ranks may have an image more each
            most = math.ceil(self.share * (self.batches * len(self.first[0]) + world_size()))
            if sum(len(place) for _, place, _ in self._unsure) > 2 * most:
                self._unsure = [self._least(most)]
        return logits

    def final(self) -> list[Tensor]:
        """After all batches, the logits [B, num_classes] of each."""
        if self._final:
            return self._final
        logits, size = torch.cat(self.first), len(self.first[0])
        _, places, images = self._least(self._count(logits))
        for place, again in zip(places.split(size), images.split(size), strict=True):
            if not len(place):
                continue
            logits = logits.index_copy(0, place, self._look_again(again, logits[place]))
        return list(logits.split(size))

    def _count(self, logits: Tensor) -> int:
        """How many of this rank's images are among the least confident of all ranks."""
        if world_size() == 1:
            return math.ceil(self.share * len(logits))
        confidence = all_gather(logits.softmax(1).amax(1))
        most = math.ceil(self.share * sum(map(len, confidence)))
        rank = torch.arange(len(confidence)).repeat_interleave(torch.tensor([len(of) for of in confidence]))
        least = torch.cat(confidence).cpu().argsort(stable=True)[:most]
        return int((rank[least] == rank()).sum())

    def _least(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all candidates, so many."""
        confidence, place, images = (torch.cat(parts) for parts in zip(*self._unsure, strict=True))
        chosen = confidence.argsort(stable=True)[:count]
        return confidence[chosen], place[chosen], images[chosen]

    def _look_again(self, images: Tensor, logits: Tensor) -> Tensor:
        """The mean over the views of images, of which one has given these logits."""
        averaged = logits + self.network(images.flip(3))
        if self.tta == "mirror_translate":
            shifted = sum(self.network(view) + self.network(view.flip(3)) for view in _shifted(images))
            averaged = (averaged + shifted / 2) / 2
        return averaged / 2


def _shifted(images: Tensor) -> Iterator[Tensor]:
    """By one pixel, down and right, then up and left; the border is reflected."""
    rows, columns = (torch.arange(-1, size - 1, device=images.device).abs() for size in images.shape[2:])
    yield images[:, :, rows][..., columns]
    yield images[:, :, len(rows) - 1 - rows.flip(0)][..., len(columns) - 1 - columns.flip(0)]
