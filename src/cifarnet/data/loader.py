"""Batches of uint8 images: all in memory, where a batch is one gather from one tensor, or streamed from files."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifarnet.data.augmentation import Augment
from cifarnet.seeding import generator
from cifarnet.system.distributed import all_gather


class LazyImages(Dataset):
    """Images that are read when they are asked for: an int gives one, uint8 [C, H, W], and a slice, a tensor of indices
    or a mask gives these, still unread."""

    shape: tuple[int, int, int, int]  # N, C, H, W, as of a tensor

    def read(self) -> Tensor:
        """All at once, uint8 [N, C, H, W]."""
        raise NotImplementedError


class Mix(Protocol):
    """What is made of two images, such as `recipes.mixup.Mixup`; all that is random in it is drawn for every image."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """One epoch's draws, a row an image of the data set: first its partner, int64 [count], then its own weight,
        float [count], and what else `__call__` asks for."""

    def __call__(self, images: Tensor, partners: Tensor, weight: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Images and their partners, uint8 [B, C, H, W] -> the mixed images, uint8, and the weight of the first label
        in each, [B]."""


class Transform(Protocol):
    """What changes single images, such as `recipes.trivialaugment.TrivialAugment`."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """One epoch's draws, a row an image of the data set."""

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """Images, uint8 [B, C, H, W], and their draws -> the changed images, uint8."""


class BatchLoader:
    """Shuffle, crop, flip and batch; a subclass says where pixels come from.

    Order, augmentation and mixing are a function of (seed, epoch, index). The position within an epoch can be saved
    and restored, which Lightning does with every checkpoint. With a `share` below 1 order depends on the losses that
    `observe` was told as well, and they are saved with it.

    Args:
        labels: int64 [N], of images that are `image_size` pixels high and wide.
        train: shuffle, augment, and drop the last batch if it is not full (but the only one); else go through all in
            order.
        augment, transforms, mix, sizes, share: as `ImageDataModule` has them (`train_sizes`, `hardest_share`); only
            when training.
        device: where images and labels are kept and augmented.
        pin: yield pinned memory, which a GPU fetches while it computes.
        rank, ranks: which of how many processes this is: it gets its share of each training batch, or of all images
            in order. Its draws are those of one process.

    Yields:
        images uint8 [B, C, H, W] (channels_last; H and W as `sizes` says), labels int64 [B] and index int64 [B], the
        images' places in the data set; where images are mixed, also the partners' labels int64 [B] and the weight of
        the images' own labels, float [B].
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
        share: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        pin: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.labels = labels.to(device)
        self.rank, self.ranks = rank, ranks
        self.image_size = image_size
        self.train, self.seed, self.pin = train, seed, pin
        self.augment, self.mix, self.sizes = (augment, mix, sizes) if train else (None, None, None)
        self.transforms = transforms if train else ()
        self.length = max(1, round(share * len(labels))) if train else len(labels)  # images an epoch
        self.batch_size = min(batch_size, self.length) if train else batch_size  # of all ranks together
        self.chooses = self.length < len(labels)  # an epoch leaves images out, by their losses
        self.epoch = 0
        self.batch_sampler = None  # Lightning looks for it and for `sampler`, as DataLoader has them
        self._served = 0  # batches of this epoch that were handed out
        self._resume: dict[str, int] = {}
        self._losses = torch.full((len(labels),), torch.inf, device=device)  # before this epoch; infinite where unknown
        self._observed = self._losses.clone()  # as of now
        self._own_observed = torch.zeros(len(labels), dtype=torch.bool, device=device)  # by this rank, not yet shared

    @property
    def sampler(self) -> "BatchLoader":
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls `sampler.set_epoch` at every epoch's start."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Indices of this epoch's images, int64 [length]: a permutation when training, or the hardest part of it."""
        count, device = len(self.labels), self.labels.device
        if not self.train:
            return self._own(torch.arange(count, device=device))
        order = torch.randperm(count, generator=generator(self.seed, self.epoch, "order")).to(device)
        if not self.chooses:
            return order
        hardest = self._losses[order].argsort(descending=True, stable=True)[: self.length]
        return order[hardest.sort().values]

    def _own(self, index: Tensor) -> Tensor:
        """This rank's share of what all ranks have together."""
        return index.tensor_split(self.ranks)[self.rank]

    def _batches(self) -> list[Tensor]:
        """Indices of each batch of this epoch."""
        if self.train:
            return [self._own(index) for index in self.order().split(self.batch_size)[: len(self)]]
        return list(self.order().split(-(-self.batch_size // self.ranks)))

    def __len__(self) -> int:
        if self.train:
            return self.length // self.batch_size
        return -(-len(self._own(self.labels)) // -(-self.batch_size // self.ranks))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        draws, mixing = self._drawn(self.augment), self._drawn(self.mix)
        changing = [(transform, self._drawn(transform)) for transform in self.transforms]
        resume, self._resume = self._resume, {}
        start = resume["served"] if resume.get("epoch") == self.epoch else 0
        if start == 0:
            self._losses = self._known().to(self.labels.device, copy=True)
        batches = self._batches()[start:]
        shown = [torch.cat([index, mixing[0][index]]) for index in batches] if mixing else batches
        self._served = start
        for index, wanted, (pixels, place) in zip(batches, shown, self._pixels(shown), strict=True):
            self._served += 1
            images = self.augment(pixels, place, *(drawn[wanted] for drawn in draws)) if draws else pixels[place]
            images = images.permute(0, 3, 1, 2)
            for transform, drawn in changing:
                images = transform(images, *(row[wanted] for row in drawn))
            batch = [self._scaled(images), self.labels[index], index]
            if mixing:
                mixed, own = self.mix(*batch[0].chunk(2), *(drawn[index] for drawn in mixing[1:]))
                partners = self.labels[mixing[0][index]]
                batch = [mixed.contiguous(memory_format=torch.channels_last), *batch[1:], partners, own]
            yield tuple(member.pin_memory() if self.pin else member for member in batch)

    def _drawn(self, change: Augment | Transform | Mix | None) -> list[Tensor]:
        """What is random about it in this epoch, a row an image of the data set."""
        if change is None:
            return []
        draws = change.draw(len(self.labels), self.image_size, self.seed, self.epoch)
        return [drawn.to(self.labels.device, non_blocking=True) for drawn in draws]

    def _scaled(self, images: Tensor) -> Tensor:
        """To the size of this epoch."""
        size = self.sizes[min(self.epoch, len(self.sizes) - 1)] if self.sizes else self.image_size
        if size == self.image_size:
            return images
        if images.device.type == "cpu":  # fast in uint8, which no other device can
            return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        scaled = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        return scaled.round().to(torch.uint8)

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch of indices: pixels uint8 [M, H, W, C], and where in them the batch's images are."""
        raise NotImplementedError

    def observe(self, index: Tensor, losses: Tensor) -> None:
        """Note the losses [B] of the images `index` [B]."""
        self._observed = self._observed.to(losses.device)  # once: nothing is copied, or waited for, in later steps
        self._observed[index] = losses.detach().float()
        if self.ranks > 1:
            self._own_observed = self._own_observed.to(losses.device)
            self._own_observed[index] = True

    def _known(self) -> Tensor:
        """Each image's last loss, whichever rank has observed it. All ranks must ask."""
        if self.ranks == 1 or not self.chooses:
            return self._observed
        observed_by = all_gather(self._own_observed.to(self._observed.device))
        for observed, by_that_rank in zip(all_gather(self._observed), observed_by, strict=True):
            self._observed = torch.where(by_that_rank, observed, self._observed)
        self._own_observed.zero_()
        return self._observed

    def state_dict(self) -> dict[str, Any]:
        losses = {"losses": self._losses, "observed": self._known()} if self.chooses else {}
        return {"epoch": self.epoch, "served": self._served, **losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved loader was: its place counts if the next epoch is the one that was interrupted."""
        self._resume = {key: state[key] for key in ("epoch", "served")}
        if self.chooses:
            self._losses.copy_(state["losses"])
            self._observed.copy_(state["observed"])


class InMemoryLoader(BatchLoader):
    """All `images`, uint8 [N, C, H, W], lie in one tensor on `device`, pixel by pixel (channels last)."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, **settings) -> None:
        super().__init__(labels, images.shape[-1], batch_size, **settings)
        self.pixels = images.to(self.labels.device).permute(0, 2, 3, 1).contiguous()

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.pixels, index) for index in batches)


class StreamingLoader(BatchLoader):
    """Images that do not fit in memory are read while training, by `workers` processes, or in this one if 0."""

    def __init__(self, images: LazyImages, labels: Tensor, batch_size: int, *, workers: int, **settings) -> None:
        super().__init__(labels, images.shape[-1], batch_size, **settings)
        self.images, self.workers = images, workers

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        loader = DataLoader(
            self.images,
            batch_sampler=[index.tolist() for index in batches],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from torch's global one, and change dropout
        )
        for images in loader:
            pixels = images.to(device, non_blocking=True).permute(0, 2, 3, 1).contiguous()
            yield pixels, torch.arange(len(pixels), device=device)
