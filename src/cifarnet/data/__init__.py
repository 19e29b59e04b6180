"""Data sets, batches and augmentation."""

from cifarnet.data.cifar10 import CIFAR10
from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.data.folder import ImageFolder
from cifarnet.data.loader import InMemoryLoader
from cifarnet.data.synthetic import Synthetic

__all__ = ["CIFAR10", "ImageDataModule", "ImageFolder", "InMemoryLoader", "Source", "Split", "Synthetic"]
