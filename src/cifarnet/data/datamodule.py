"""The LightningDataModule, which splits and batches images; subclasses read them."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import lightning as L
import torch
from torch import Tensor

from cifarnet.data.augmentation import Augment, Flip
from cifarnet.data.loader import Batch, BatchLoader, InMemoryLoader
from cifarnet.data.streaming import LazyImages, StreamingLoader
from cifarnet.data.subsets import Selection, balanced_weights
from cifarnet.data.transforms import Mix, PerImage
from cifarnet.errors import UserError
from cifarnet.schema import Pixels, Range, Seed
from cifarnet.seeding import generator
from cifarnet.system import hardware

BATCH = "a Batch of images (uint8 [B, 3, H, W]), labels (int64 [B]) and index (int64 [B], positions in the data set)"


def check_batch(batch: Any) -> Batch:
    """Return the batch of a loader.

    Raises:
        UserError: it is not a `Batch`.
    """
    if not isinstance(batch, Batch):
        remedy = "Use cifarnet.data.InMemoryLoader(images, labels, batch_size)."
        raise UserError(f"The loader yields {type(batch).__name__}: expected {BATCH}. {remedy}")
    return batch


@dataclass
class Split:
    """Images, uint8 [N, 3, H, W], in memory or decoded on access, and their labels, int64 [N]."""

    images: Tensor | LazyImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def chunks(self, size: int = 1000) -> Iterator[Tensor]:
        """Yield all images in chunks, uint8 [size, 3, H, W]."""
        for start in range(0, len(self), size):
            images = self.images[start : start + size]
            yield images if isinstance(images, Tensor) else images.read()


@dataclass
class Source:
    """The parts of a data set. If `val` is None, a part of `train` is set aside for validation.

    Attributes:
        train_index: the positions of the images of `train` in the training images of the data set, int64 [N]; None
            before images are selected.
        files: the paths of all images of "train", "test" and "val" in the data set, relative to `data.root`; empty if
            an image is not a file of its own.
        selection: a description of the selected training images for the record, if `Selection.changes_training`.
    """

    class_names: list[str]
    train: Split
    test: Split
    val: Split | None = None
    train_index: Tensor | None = None
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    @property
    def validation(self) -> Split:
        """The validation images; available after they have been set aside."""
        assert self.val is not None
        return self.val

    @functools.cached_property
    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of each channel of the training images, for values from 0 to 1."""
        counts = torch.zeros(self.train.images.shape[1], 256, dtype=torch.int64)
        for images in self.train.chunks():
            counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        # exact, and without a float copy of the images
        frequencies = counts.double() / counts.double().sum(1, keepdim=True)
        levels = torch.arange(256).double() / 255
        mean = frequencies @ levels
        return mean, (frequencies @ levels.square() - mean.square()).clamp_min(0).sqrt()

    @functools.cached_property
    def checksum(self) -> str | None:
        """A checksum of all pixels and labels; None for streamed images, which would be decoded again."""
        if not isinstance(self.train.images, Tensor):
            return None
        checksum = hashlib.sha256()
        for split in filter(None, (self.train, self.val, self.test)):
            for images in split.chunks():
                checksum.update(images.permute(0, 2, 3, 1).contiguous().numpy().data)
            checksum.update(split.labels.numpy().data)
        return checksum.hexdigest()


class ImageDataModule(Selection, L.LightningDataModule):
    """A data module that selects and batches images. Subclasses implement `read()`.

    Args:
        batch_size, eval_batch_size: the images per step, over all devices, in training, and in validation and test.
        crop_padding, flip, cutout: see `Augment`.
        train_sizes: the height and width to which training images are resized, one value per epoch; the last value is
            used for all later epochs. Small images make the first epochs faster. None: no resizing.
        sampler: balanced: an epoch has as many images as there are, and draws all classes equally often; images of
            small classes are repeated, with another augmentation each time, and some images of large classes are left
            out. None: each image occurs once.
        hardest_share: the fraction of the training images that an epoch uses: first the images that were never used,
            then those with the highest loss when they were last used (StaleSB, Jiang et al., 2019,
            https://arxiv.org/abs/1910.00762). Images with wrong labels also have high losses.
        transforms: transforms of single training images, such as `recipes.erasing.RandomErasing`, under any names; they
            are applied in order, after crop, flip and cutout. Those of torchvision (v1 or v2) are slower.
        mix: a transform that mixes pairs of training images, such as `recipes.mixup.Mixup`; None: no mixing.
        shuffle_seed: determines the order and the augmentation.
        on_device: store the images in GPU memory; otherwise they are stored on the host, and batches are copied while
            the GPU computes.
        read_only: use only existing files: download nothing, and write no cache. Commands set it when the data is
            chosen by a checkpoint and not by the user.
        selection: the settings of `Selection`: validation images, folds, subsets and label noise.
    """

    def __init__(
        self,
        batch_size: Annotated[int, Range(1, 10**6)] = 128,
        eval_batch_size: Annotated[int, Range(1, 10**6)] = 1000,
        crop_padding: Annotated[int, Range(0, 4095)] = 2,
        flip: Flip = "random",
        cutout: Annotated[int, Range(0, 4096)] = 0,
        train_sizes: Sequence[Pixels] | None = None,
        sampler: Literal["balanced"] | None = None,
        hardest_share: Annotated[float, Range(above=0, most=1)] = 1.0,
        transforms: Mapping[str, Any] | None = None,
        mix: Mix | None = None,
        shuffle_seed: Seed = 0,
        on_device: bool = True,
        read_only: bool = False,
        **selection: Any,
    ) -> None:
        super().__init__(**selection)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.augment, self.mix = Augment(crop_padding, flip, cutout), mix
        named = {name: transform for name, transform in (transforms or {}).items() if transform is not None}
        self.transforms = [part if hasattr(part, "draw") else PerImage(name, part) for name, part in named.items()]
        if mix is not None and not hasattr(mix, "draw"):
            raise UserError(f"data.mix={type(mix).__name__} has no draw. Choose +recipe=mixup or +recipe=cutmix.")
        if sampler is not None and (hardest_share < 1 or flip == "alternating"):  # both follow the images of an epoch
            other = f"data.hardest_share={hardest_share}" if hardest_share < 1 else f"data.flip={flip}"
            raise UserError(f"data.sampler={sampler} excludes {other}. Remove one of them.")
        self.sampler = sampler
        self.train_sizes = None if train_sizes is None else list(train_sizes)
        self.hardest_share = hardest_share
        self.shuffle_seed, self.on_device = shuffle_seed, on_device
        self.read_only = read_only
        self.source_name = type(self).__name__  # in records
        self.workers: int | None = 0
        self.preloaded: Source | None = None  # the images and their validation split, if they were already read

    def read(self) -> Source:
        """Read all images of the data set. It is called once."""
        raise NotImplementedError(f"{type(self).__name__} must implement read()")

    def images_per_epoch(self, source: Source) -> int:
        """Return the number of training images in an epoch, before they are divided into batches."""
        return max(1, round(self.hardest_share * len(source.train)))

    @functools.cached_property
    def source(self) -> Source:
        """The images and the validation split, which are read on first use.

        Raises:
            UserError: the images cannot be read, or are too few or too small for the settings.
        """
        source = self.preloaded or self._selected(self.read())
        if self.batch_size > (count := self.images_per_epoch(source)):
            print(f"data.batch_size={self.batch_size}: the {count} images of each epoch form one batch.", flush=True)
        size = source.train.images.shape[-1]
        for name, most in {"crop_padding": size - 1, "cutout": size}.items():
            if (value := getattr(self.augment, name)) > most:
                raise UserError(f"data.{name}={value} exceeds {size}-pixel images. Choose data.{name}={most} or less.")
        return source

    @property
    def validates(self) -> bool:
        """Whether there are validation images. The images are read if the settings do not determine it."""
        return bool(self.folds or self.val_fraction) or len(self.source.validation) > 0

    def _selected(self, source: Source) -> Source:
        """Select the training and validation images, and the training labels."""
        if source.val is not None and self.folds is not None:
            problem = f"data.folds={self.folds}: the data set has validation images of its own"
            raise UserError(f"{problem}. Move them to the training images, or set data.folds=null data.fold=null.")
        if self.folds is not None:
            _ = source.checksum  # of the undivided images, which is the same for all folds
        true = source.train.labels
        selected = self.select(true, len(source.class_names), sets_aside=source.val is None)
        index, labels = selected.train, selected.labels[selected.train]
        source.val = source.val or source.train[selected.val]
        source.train, source.train_index = source.train[selected.rest], index
        if self.changes_training:
            _ = source.checksum  # of all images with their true labels, as without these settings
            source.train = Split(source.train.images[torch.searchsorted(selected.rest, index)], labels)
            per_class = torch.bincount(labels, minlength=len(source.class_names)).tolist()
            source.selection = {"train_per_class": per_class, "wrong_labels": int((labels != true[index]).sum())}
            source.selection |= {"files_sha256": selected.files_sha256} if selected.files_sha256 else {}
        return source

    @property
    def class_names(self) -> list[str]:
        return self.source.class_names

    @property
    def image_size(self) -> int:
        """The height and width in pixels."""
        return self.source.train.images.shape[-1]

    def sample(self, count: int = 5000) -> Tensor:
        """Return `count` training images (or all, if fewer), uint8 [N, 3, H, W]; they do not depend on the seed."""
        train = self.source.train
        chosen = torch.randperm(len(train), generator=generator(0, 0, "sample"))[:count]
        return next(train[chosen].chunks(count))

    def balanced_weights(self) -> list[float]:
        """Return a weight for each class, inversely proportional to its number of training images; see `objective`."""
        return balanced_weights(self.source.train.labels, len(self.class_names))

    def describe(self) -> dict:
        """Describe the images for the record: counts, and a checksum of all pixels and labels (None if streamed).

        The checksum is that of the data set, before any training images are left out or labels are changed.
        """
        splits = {"train": self.source.train, "val": self.source.validation, "test": self.source.test}
        counts = {"classes": len(self.class_names), **{name: len(split) for name, split in splits.items()}}
        return {"source": self.source_name, **counts, "sha256": self.source.checksum, **self.source.selection}

    def train_dataloader(self) -> BatchLoader:
        return self.loader(self.source.train, self.batch_size, train=True)

    def val_dataloader(self) -> BatchLoader | list:
        images = self.source.validation
        return self.loader(images, self.eval_batch_size) if len(images) else []

    def test_dataloader(self) -> BatchLoader:
        return self.loader(self.source.test, self.eval_batch_size)

    def predict_dataloader(self) -> BatchLoader:
        return self.test_dataloader()

    def loader(self, split: Split, batch_size: int, train: bool = False) -> BatchLoader:
        """Return a loader of a split; with `train`, it shuffles and augments the images."""
        if self.augment.cutout:
            self.augment.fill = (255 * self.source.channel_statistics[0]).round()  # zero after normalization
        trains_on = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        rank, size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if (least := min(batch_size, len(split))) < size:
            raise UserError(f"A batch of {least} images is too small for {size} devices. Use at most {least} devices.")
        settings = {"train": train, "augment": self.augment, "mix": self.mix, "sizes": self.train_sizes}
        settings |= {"transforms": self.transforms, "balanced": self.sampler == "balanced"}
        settings |= {"share": self.hardest_share, "seed": self.shuffle_seed, "rank": rank, "world_size": size}
        settings["device"] = trains_on if self.on_device else torch.device("cpu")
        settings["pin"] = trains_on.type == "cuda" and not self.on_device
        if not isinstance(split.images, Tensor):
            num_devices = self.trainer.num_devices if self.trainer else 1  # ranks on one machine share its cores
            workers = max(1, hardware.cores() // num_devices) if self.workers is None else self.workers
            return StreamingLoader(split.images, split.labels, batch_size, workers=workers, **settings)
        if settings["device"].type == "cuda":
            free, needed = torch.cuda.mem_get_info(trains_on)[0], split.images.numel()
            if needed > free:
                sizes = f"{needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of GPU memory are free"
                raise UserError(f"The images need {sizes}. Keep them on the host: data.on_device=false.")
        return InMemoryLoader(split.images, split.labels, batch_size, **settings)
