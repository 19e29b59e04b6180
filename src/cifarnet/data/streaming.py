"""Batches of images that are decoded while training, for data sets that do not fit in memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifarnet.data.loader import BatchLoader
from cifarnet.errors import UserError


class LazyImages(Dataset):
    """Images that are decoded on access. An int returns one image, uint8 [C, H, W]; a slice, a tensor of indices or a
    mask returns the selected images without decoding them."""

    shape: tuple[int, int, int, int]  # N, C, H, W

    def read(self) -> Tensor:
        """Decode all images: uint8 [N, C, H, W]."""
        raise NotImplementedError


class StreamingLoader(BatchLoader):
    """A loader of images that do not fit in memory; `workers` processes decode them (0: this process)."""

    def __init__(self, images: LazyImages, labels: Tensor, batch_size: int, *, workers: int, **settings: Any) -> None:
        super().__init__(labels, images.shape[-1], batch_size, **settings)
        self.images, self.workers = images, workers

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        loader = DataLoader(
            self.images,
            batch_sampler=[index.tolist() for index in batches],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default, torch's global generator, would change dropout
        )
        try:
            for images in loader:
                pixels = images.to(device, non_blocking=True).permute(0, 2, 3, 1).contiguous()
                yield pixels, torch.arange(len(pixels), device=device)
        except UserError as error:  # if a worker raised it, DataLoader has put a traceback before the message
            message = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
            raise UserError(message.strip()) from None
