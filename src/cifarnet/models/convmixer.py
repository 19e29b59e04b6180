"""ConvMixer: patches, mixed in space by depthwise convolutions and across channels by 1×1 convolutions."""

from typing import Annotated

from torch import Tensor, nn

from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range


class Block(nn.Module):
    """A depthwise convolution with a residual connection, and a 1×1 convolution; the norms follow the activations."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, kernel_size, padding="same", groups=width)
        self.space = nn.Sequential(depthwise, nn.GELU(), nn.BatchNorm2d(width))
        self.channels = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x + self.space(x))


class ConvMixer(nn.Module):
    """ConvMixer-width/depth (Trockman and Kolter, 2022, https://arxiv.org/abs/2201.09792).

    The patch size and the kernel size are from its CIFAR-10 experiments (https://github.com/locuslab/convmixer-cifar10).
    594,186 parameters with the default arguments.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; H and W are at least
    patch_size.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: Annotated[int, Range(1, 65536)] = 256,
        depth: Annotated[int, Range(1, 1024)] = 8,
        patch_size: Annotated[int, Range(1, 4096)] = 2,
        kernel_size: Annotated[int, Range(1, 4096)] = 5,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(in_chans)
        patches = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        self.stem = nn.Sequential(patches, nn.GELU(), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(Block(width, kernel_size) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(self.normalize(images))).mean((2, 3)))
