"""Batches: out of memory, where a batch is one gather from one tensor, or streamed from files."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from cifarnet.data.augmentation import Augment
from cifarnet.seeding import generator


class LazyImages(Protocol):
    """Images that are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W, as of a tensor."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any:
        """An int gives one image, uint8 [C, H, W]; a tensor of indices, or a mask, these images, still unread."""
        ...


class Mix(Protocol):
    """What is made of two images, such as `recipes.mixup.Mixup`; all that is random in it is drawn for every image."""

    def draw(self, count: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """One epoch's draws, a row an image of the data set: first its partner, int64 [count], then its own weight,
        float [count], and what else `__call__` asks for."""
        ...

    def __call__(self, images: Tensor, partners: Tensor, weight: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Images and their partners, uint8 [B, C, H, W] -> the mixed images, uint8, and the weight of the first label
        in each, [B]."""
        ...


class EpochSampler:
    """The order of one epoch: a permutation that depends on (seed, epoch) alone, or the hardest part of it.

    Args:
        count: number of images.
        shuffle: else they come in order.
        share: part of the images that come: those with the highest `losses`, a float an image, infinite where unknown.
    """

    def __init__(
        self, count: int, shuffle: bool, seed: int, share: float = 1.0, device: torch.device | str = "cpu"
    ) -> None:
        self.shuffle = shuffle
        self.seed = seed
        self.length = round(share * count)  # images an epoch
        self.losses = torch.full((count,), torch.inf, device=device)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at every epoch's start."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Indices of the images, int64 [length]."""
        count, device = len(self.losses), self.losses.device
        if not self.shuffle:
            return torch.arange(count, device=device)
        order = torch.randperm(count, generator=generator(self.seed, self.epoch, "order")).to(device)
        if self.length == count:
            return order
        hardest = self.losses[order].argsort(descending=True, stable=True)[: self.length]
        return order[hardest.sort().values]


class BatchLoader:
    """Shuffle, crop, flip and batch; a subclass says where pixels come from.

    Order, augmentation and mixing are a function of (seed, epoch, index). The position within an epoch can be saved
    and restored, which Lightning does with every checkpoint. With a `share` below 1 order depends on the losses that
    `observe` was told as well, and they are saved with it.

    Args:
        labels: int64 [N].
        image_size: height and width.
        batch_size: images a batch.
        train: shuffle, augment, and drop the last batch if it is not full; else go through all in order.
        augment: crops, flips and holes, used when training.
        mix: what is made of an image and its partner, used when training.
        sizes: height and width to which training images are scaled at last, one value an epoch; the last one stays.
        share: part of the images that an epoch of training goes through: those whose loss was highest when it was last
            observed, and before them those whose loss never was.
        device: where images and labels are kept and augmented.
        pin: yield pinned memory, which a GPU fetches while it computes.

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
        mix: Mix | None = None,
        sizes: Sequence[int] | None = None,
        share: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        pin: bool = False,
    ) -> None:
        self.labels = labels.to(device)
        self.image_size = image_size
        self.batch_size = batch_size
        self.train = train
        self.augment = augment if train else None
        self.mix = mix if train else None
        self.sizes = sizes if train else None
        self.pin = pin
        self.sampler = EpochSampler(len(labels), train, seed, share if train else 1.0, device)
        self.batch_sampler = None  # Lightning looks for both names, as DataLoader has them
        self._served = 0  # batches of this epoch that were handed out
        self._resume: dict[str, int] = {}
        self._losses = self.sampler.losses.clone()  # as observed so far: the sampler's are those before this epoch

    def __len__(self) -> int:
        count = self.sampler.length
        return count // self.batch_size if self.train else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        device, (seed, epoch) = self.labels.device, (self.sampler.seed, self.sampler.epoch)
        draws, mixing = None, []
        if self.augment is not None:
            draws = self.augment.draw(len(self.labels), self.image_size, seed, epoch).to(device)
        if self.mix is not None:
            mixing = [drawn.to(device) for drawn in self.mix.draw(len(self.labels), self.image_size, seed, epoch)]
        resume, self._resume = self._resume, {}
        start = resume["served"] if resume.get("epoch") == epoch else 0
        if start == 0:
            self.sampler.losses = self._losses.to(device, copy=True)
        batches = self.sampler.order().split(self.batch_size)[start : len(self)]
        shown = [torch.cat([index, mixing[0][index]]) for index in batches] if mixing else batches
        self._served = start
        for index, wanted, (pixels, place) in zip(batches, shown, self._pixels(shown), strict=True):
            self._served += 1
            images = pixels[place] if draws is None else self.augment(pixels, place, draws.at(wanted))
            batch = [self._scaled(images.permute(0, 3, 1, 2)), self.labels[index], index]
            if mixing:
                mixed, own = self.mix(*batch[0].chunk(2), *(drawn[index] for drawn in mixing[1:]))
                partners = self.labels[mixing[0][index]]
                batch = [mixed.contiguous(memory_format=torch.channels_last), *batch[1:], partners, own]
            yield tuple(member.pin_memory() if self.pin else member for member in batch)

    def _scaled(self, images: Tensor) -> Tensor:
        """To the size of this epoch."""
        size = self.sizes[min(self.sampler.epoch, len(self.sizes) - 1)] if self.sizes else self.image_size
        if size == self.image_size:
            return images
        if images.device.type == "cpu":  # fast in uint8, which no other device can
            return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        scaled = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        return scaled.round().to(torch.uint8)

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch of indices: pixels uint8 [M, H, W, C], and where in them the batch's images are."""
        raise NotImplementedError

    @property
    def chooses(self) -> bool:
        """Whether an epoch leaves images out, by their losses."""
        return self.sampler.length < len(self.labels)

    def observe(self, index: Tensor, losses: Tensor) -> None:
        """Note the losses [B] of the images `index` [B]."""
        self._losses = self._losses.to(losses.device)  # once: nothing is copied, or waited for, in later steps
        self._losses[index] = losses.detach().float()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": self.sampler.epoch, "served": self._served}
        if self.chooses:
            state |= {"losses": self.sampler.losses, "observed": self._losses}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved loader was: its place counts if the next epoch is the one that was interrupted."""
        self._resume = {key: state[key] for key in ("epoch", "served")}
        if self.chooses:
            self.sampler.losses.copy_(state["losses"])
            self._losses.copy_(state["observed"])


class InMemoryLoader(BatchLoader):
    """All images lie in one tensor on `device`, pixel by pixel (channels last).

    Args:
        images: uint8 [N, C, H, W].
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, **settings) -> None:
        super().__init__(labels, images.shape[-1], batch_size, **settings)
        self.pixels = images.to(self.labels.device).permute(0, 2, 3, 1).contiguous()

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.pixels, index) for index in batches)


class StreamingLoader(BatchLoader):
    """Images are read while training, by worker processes, for data that does not fit in memory.

    Args:
        images: those of a data set that reads them one by one.
        workers: processes that read; 0 reads in this one.
    """

    def __init__(self, images: LazyImages, labels: Tensor, batch_size: int, *, workers: int, **settings) -> None:
        super().__init__(labels, images.shape[-1], batch_size, **settings)
        self.images = images
        self.workers = workers

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
