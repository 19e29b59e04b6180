"""MobileNetV2 for small images: inverted bottlenecks with depthwise convolutions."""

from typing import Annotated

from torch import Tensor, nn

from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range

# of each stage: expansion inside a block, output channels, number of blocks, stride of the first block
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def multiple_of_8(width: float) -> int:
    """Return the nearest multiple of 8 that is at least 90% of the width."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


def conv_norm(in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return [conv, nn.BatchNorm2d(out_chans)]


class Block(nn.Module):
    """1×1 convolution to `expand` times the channels, 3×3 depthwise convolution, 1×1 convolution to out_chans.

    If the shape does not change, the input is added.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, expand: int) -> None:
        super().__init__()
        inside = in_chans * expand
        widen = [*conv_norm(in_chans, inside, 1), nn.ReLU6(inplace=True)] if expand > 1 else []
        depthwise = [*conv_norm(inside, inside, 3, stride, groups=inside), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*widen, *depthwise, *conv_norm(inside, out_chans, 1))  # linear at the end
        self.adds_input = stride == 1 and in_chans == out_chans

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds_input else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., 2018, https://arxiv.org/abs/1801.04381) with strides for small images.

    The stem and the second stage have stride 1, as in https://github.com/kuangliu/pytorch-cifar, so that 32×32 pixels
    become 4×4. The blocks are as in the paper; kuangliu's code has additional 1×1 convolutions in some shortcuts and
    in the first block. 2,236,682 parameters with the default arguments.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: Annotated[float, Range(above=0, most=64)] = 1.0,  # the factor of the paper's channels
        drop_rate: Annotated[float, Range(0, below=1)] = 0.2,  # dropout before the head
    ) -> None:
        super().__init__()
        self.normalize = Normalize(in_chans)
        chans = multiple_of_8(32 * width)
        layers: list[nn.Module] = [*conv_norm(in_chans, chans, 3), nn.ReLU6(inplace=True)]
        for expand, out_chans, depth, first_stride in STAGES:
            out_chans = multiple_of_8(out_chans * width)
            for stride in (first_stride, *[1] * (depth - 1)):
                layers.append(Block(chans, out_chans, stride, expand))
                chans = out_chans
        last = multiple_of_8(1280 * max(1, width))
        self.features = nn.Sequential(*layers, *conv_norm(chans, last, 1), nn.ReLU6(inplace=True))
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(last, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(self.normalize(images)).mean((2, 3))))
