"""Batches of augmented uint8 images."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cifarnet.data import subsets
from cifarnet.data.augmentation import Augment
from cifarnet.data.transforms import Mix, Transform, resize
from cifarnet.seeding import generator
from cifarnet.system.distributed import all_gather


class Batch(NamedTuple):
    images: Tensor  # uint8 [B, 3, H, W]
    labels: Tensor  # int64 [B]
    index: Tensor  # the positions of the images in the data set, int64 [B]
    partners: Tensor | None = None  # the labels of the mixed-in images, int64 [B]
    lam: Tensor | None = None  # the weights of `labels`, float [B]; the weights of `partners` are 1 - lam

    def pin_memory(self) -> "Batch":
        return Batch(*(None if part is None else part.pin_memory() for part in self))  # pyright: ignore


class BatchLoader:
    """A loader that shuffles, augments and batches images; subclasses provide the pixels.

    The order, augmentation and mixing are a function of (seed, epoch, index). If `share` is below 1, the order also
    depends on the losses that were passed to `observe`. The position within an epoch can be saved and restored.

    Args:
        labels: the labels, int64 [N].
        image_size: the height and width of the images in pixels.
        train: shuffle and augment the images, and drop the last batch if it is incomplete and not the only one;
            otherwise yield all images in order.
        augment, transforms, mix, sizes, balanced, share: as in `ImageDataModule` (`train_sizes`, `sampler`,
            `hardest_share`); training only.
        device: the device on which images and labels are stored and augmented.
        pin: yield batches in pinned memory, which can be copied to a GPU while it computes.
        rank, world_size: each process gets a part of every training batch, or of all images in order. The random
            draws are the same as in a single process.
    """

    def __init__(
        self,
        labels: Tensor,
        image_size: int,
        batch_size: int,
        *,
        train: bool = False,
        augment: Augment | None = None,
        transforms: Sequence[Transform] = (),
        mix: Mix | None = None,
        sizes: Sequence[int] | None = None,
        balanced: bool = False,
        share: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        pin: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = labels.to(device)
        self.image_size, self.rank, self.world_size = image_size, rank, world_size
        self.train, self.seed, self.pin, self.balanced = train, seed, pin, train and balanced
        self.augment, self.mix, self.sizes = (augment, mix, sizes) if train else (None, None, None)
        self.transforms = transforms if train else ()
        self.length = max(1, round(share * len(labels))) if train else len(labels)  # images per epoch
        self.batch_size = min(batch_size, self.length) if train else batch_size  # over all ranks
        self.selects = self.length < len(labels)  # whether an epoch leaves out images with low losses
        self.epoch = 0
        self.batch_sampler = None  # Lightning expects it beside `sampler`
        self._served = 0  # the number of batches yielded in this epoch
        self._resume_epoch, self._resume_served = -1, 0
        self._losses = torch.full((len(labels),), torch.inf, device=device)  # before this epoch; infinite if unknown
        self._observed = self._losses.clone()  # the latest losses
        self._observed_here = torch.zeros(len(labels), dtype=torch.bool, device=device)  # since the last all_gather

    @property
    def sampler(self) -> "BatchLoader":
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls `sampler.set_epoch` at the start of every epoch."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Return the indices of this epoch's images, int64 [length]; in training, the hardest images, shuffled."""
        count, device = len(self.labels), self.labels.device
        if not self.train:
            return self._part(torch.arange(count, device=device))
        order = torch.randperm(count, generator=generator(self.seed, self.epoch, "order")).to(device)
        if not self.selects:
            return order
        hardest = self._losses[order].argsort(descending=True, stable=True)[: self.length]
        return order[hardest.sort().values]

    def _part(self, index: Tensor) -> Tensor:
        """Return this rank's part of the indices of all ranks."""
        return index.tensor_split(self.world_size)[self.rank]

    def _batches(self) -> list[Tensor]:
        """Return the indices of each batch of this epoch."""
        if self.train:
            return [self._part(index) for index in self.order().split(self.batch_size)[: len(self)]]
        return list(self.order().split(-(-self.batch_size // self.world_size)))

    def __len__(self) -> int:
        if self.train:
            return self.length // self.batch_size
        return -(-len(self._part(self.labels)) // -(-self.batch_size // self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        draws, mixing = self._draw(self.augment), self._draw(self.mix)
        transforms = [(transform, self._draw(transform)) for transform in self.transforms]
        start = self._resume_served if self._resume_epoch == self.epoch else 0
        self._resume_epoch = -1
        if start == 0:
            self._losses = self._gather_losses().to(self.labels.device, copy=True)
        batches = [torch.cat([index, mixing[0][index]]) if mixing else index for index in self._batches()[start:]]
        shown = batches
        if self.balanced:  # the numbers so far are positions in the epoch
            drawn = subsets.balanced(self.labels.cpu(), self.seed, self.epoch).to(self.labels.device)
            shown = [drawn[index] for index in batches]
        size = self.sizes[min(self.epoch, len(self.sizes) - 1)] if self.sizes else self.image_size
        self._served = start
        for index, image, (pixels, place) in zip(batches, shown, self._pixels(shown), strict=True):
            self._served += 1
            images = self.augment(pixels, place, *(row[index] for row in draws)) if self.augment else pixels[place]
            images = images.permute(0, 3, 1, 2)
            for transform, rows in transforms:
                images = transform(images, *(row[index] for row in rows))
            batch = Batch(resize(images, size), self.labels[image], image)
            if self.mix is not None:
                (first, second), (labels, partners) = batch.images.chunk(2), batch.labels.chunk(2)
                mixed, lam = self.mix(first, second, *(row[index.chunk(2)[0]] for row in mixing[1:]))
                mixed = mixed.contiguous(memory_format=torch.channels_last)
                batch = Batch(mixed, labels, image.chunk(2)[0], partners, lam)
            yield batch.pin_memory() if self.pin else batch

    def _draw(self, change: Augment | Transform | Mix | None) -> list[Tensor]:
        """Return the random draws of this epoch, one element per image of the data set."""
        if change is None:
            return []
        draws = change.draw(len(self.labels), self.image_size, self.seed, self.epoch)
        return [row.to(self.labels.device, non_blocking=True) for row in draws]

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each batch of indices, pixels, uint8 [M, H, W, C], and the positions of the batch in them."""
        raise NotImplementedError

    def observe(self, index: Tensor, losses: Tensor) -> None:
        """Record the losses [B] of the images `index` [B]."""
        self._observed = self._observed.to(losses.device)  # moved once; later steps copy nothing
        self._observed[index] = losses.detach().float()
        if self.world_size > 1:
            self._observed_here = self._observed_here.to(losses.device)
            self._observed_here[index] = True

    def _gather_losses(self) -> Tensor:
        """Return the latest loss of each image over all ranks. All ranks must call it."""
        if self.world_size == 1 or not self.selects:
            return self._observed
        observers = all_gather(self._observed_here.to(self._observed.device))
        for observed, observed_there in zip(all_gather(self._observed), observers, strict=True):
            self._observed = torch.where(observed_there, observed, self._observed)
        self._observed_here.zero_()
        return self._observed

    def position(self) -> dict[str, Any]:
        """Return the position within the epoch, for `restore`. All ranks must call it."""
        losses = {"losses": self._losses, "observed": self._gather_losses()} if self.selects else {}
        return {"epoch": self.epoch, "served": self._served, **losses}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue at a saved position, if the next epoch is the interrupted one."""
        self._resume_epoch, self._resume_served = position["epoch"], position["served"]
        if self.selects:
            self._losses.copy_(position["losses"])
            self._observed.copy_(position["observed"])


class InMemoryLoader(BatchLoader):
    """A loader of `images`, uint8 [N, C, H, W], which it stores in one channels_last tensor on `device`."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, **settings: Any) -> None:
        super().__init__(labels, images.shape[-1], batch_size, **settings)
        self.pixels = images.to(self.labels.device).permute(0, 2, 3, 1).contiguous()

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.pixels, index) for index in batches)
