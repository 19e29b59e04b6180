"""DenseNet-BC: each layer takes the outputs of all previous layers of its block."""

from typing import Annotated

import torch
from torch import Tensor, nn

from cifarnet.models.resnet import ConvNet, initialize
from cifarnet.schema import Range


def step(chans: int, out: int, kernel_size: int, drop_rate: float) -> list[nn.Module]:
    """Return the layers norm, ReLU, convolution and dropout."""
    conv = nn.Conv2d(chans, out, kernel_size, padding=kernel_size // 2, bias=False)
    return [nn.BatchNorm2d(chans), nn.ReLU(inplace=True), conv, nn.Dropout(drop_rate)]


class Layer(nn.Module):
    """Append growth_rate channels to the input: [B, chans, H, W] -> [B, chans + growth_rate, H, W]."""

    def __init__(self, chans: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        bottleneck = 4 * growth_rate
        self.new = nn.Sequential(*step(chans, bottleneck, 1, drop_rate), *step(bottleneck, growth_rate, 3, drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


class DenseNet(ConvNet):
    """A 3×3 convolution, three blocks of (depth - 4) / 6 layers, norm, ReLU, average pool, linear head.

    Huang et al. (2016, https://arxiv.org/abs/1608.06993): DenseNet-BC-depth-growth_rate; between blocks, channels,
    height and width are halved. 769,162 parameters with the default arguments. The paper uses a dropout rate of 0.2 if
    images are not augmented.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; H and W are at least 4.

    Raises:
        ValueError: `depth` is not 6n + 4.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(10, 2000)] = 100,
        growth_rate: Annotated[int, Range(1, 1024)] = 12,  # channels that each layer adds
        drop_rate: Annotated[float, Range(0, below=1)] = 0.0,  # after each convolution of the blocks
    ) -> None:
        if depth % 6 != 4:
            raise ValueError(f"depth={depth}: use 6n + 4, such as 40, 100 or 190")
        chans = 2 * growth_rate
        layers: list[nn.Module] = [nn.Conv2d(in_chans, chans, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                layers += [*step(chans, chans // 2, 1, drop_rate), nn.AvgPool2d(2)]
                chans //= 2
            for _ in range((depth - 4) // 6):
                layers.append(Layer(chans, growth_rate, drop_rate))
                chans += growth_rate
        layers += [nn.BatchNorm2d(chans), nn.ReLU(inplace=True)]
        super().__init__(num_classes, in_chans, nn.Sequential(*layers), chans)
        initialize(self.layers)
