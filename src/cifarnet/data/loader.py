"""Batches out of memory: the whole data set is one uint8 tensor, a batch is one gather from it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cifarnet.data.augment import Augment, Draws
from cifarnet.seeding import generator


class EpochSampler:
    """The order of one epoch: a permutation that depends on (seed, epoch) alone."""

    def __init__(self, count: int, shuffle: bool, seed: int) -> None:
        self.count = count
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at every epoch's start."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Indices of the images, int64 [count]."""
        if not self.shuffle:
            return torch.arange(self.count)
        return torch.randperm(self.count, generator=generator(self.seed, self.epoch, "order"))


class InMemoryLoader:
    """Shuffle, crop, flip and batch images that lie in memory, on any device.

    Order and augmentation are a function of (seed, epoch, index). The position within an epoch can be saved
    and restored, which Lightning does with every checkpoint.

    Args:
        images: uint8 [N, C, H, W]; they are kept on `device`, pixel by pixel (channels last).
        labels: int64 [N].
        batch_size: images a batch.
        train: shuffle, augment, and drop the last batch if it is not full; else go through all in order.
        augment: crops and flips, used when training.

    Yields:
        images uint8 [B, C, H, W] (channels_last) and labels int64 [B].
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        train: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pixels = images.to(device).permute(0, 2, 3, 1).contiguous()  # [N, H, W, C]: a pixel is one row to copy
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.train = train
        self.augment = augment if train else None
        self.sampler = EpochSampler(len(labels), shuffle=train, seed=seed)
        self.batch_sampler = None  # Lightning looks for both names, as DataLoader has them
        self._served = 0  # batches of this epoch that were handed out
        self._resume: dict[str, int] = {}

    def __len__(self) -> int:
        count = len(self.labels)
        return count // self.batch_size if self.train else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        order = self.sampler.order().to(device)
        draws = None
        if self.augment is not None:
            draws = self.augment.draw(len(self.labels), self.sampler.seed, self.sampler.epoch)
            draws = Draws(*(drawn.to(device) for drawn in draws))

        resume, self._resume = self._resume, {}
        start = resume["served"] if resume.get("epoch") == self.sampler.epoch else 0
        for batch in range(start, len(self)):
            self._served = batch + 1
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.augment is None or draws is None:
                images = self.pixels[index]
            else:
                images = self._gather(index, self.augment, Draws(*(drawn[index] for drawn in draws)))
            yield images.permute(0, 3, 1, 2), self.labels[index]

    def _gather(self, index: Tensor, augment: Augment, draws: Draws) -> Tensor:
        """Crop and flip by copying each output pixel from where it lies in the data set."""
        _, height, width, channels = self.pixels.shape
        rows, columns = augment.sources(draws, height, width)
        pixel = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
        return self.pixels.view(-1, channels).index_select(0, pixel.flatten()).view(*pixel.shape, channels)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the saved loader was: takes effect if the next epoch is the one that was interrupted."""
        self._resume = dict(state)
