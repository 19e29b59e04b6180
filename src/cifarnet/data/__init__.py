"""Data sets, batches and augmentation."""

from cifarnet.data.cifar10 import CIFAR10, CIFAR100
from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.data.folder import ImageFolder
from cifarnet.data.loader import InMemoryLoader
from cifarnet.data.synthetic import Synthetic
from cifarnet.data.torchvision import Torchvision

__all__ = ["CIFAR10", "CIFAR100", "ImageDataModule", "ImageFolder", "InMemoryLoader", "Source", "Split"]
__all__ += ["Synthetic", "Torchvision"]
