"""DenseNet-BC: every layer sees the outputs of all layers before it in its block."""

from typing import Annotated

import torch
from torch import Tensor, nn

from cifarnet.models.resnet import ConvNet, initialize
from cifarnet.schema import Range


def step(chans: int, out: int, kernel_size: int, drop_rate: float) -> list[nn.Module]:
    """Norm, ReLU, convolution, dropout."""
    conv = nn.Conv2d(chans, out, kernel_size, padding=kernel_size // 2, bias=False)
    return [nn.BatchNorm2d(chans), nn.ReLU(inplace=True), conv, nn.Dropout(drop_rate)]


class Layer(nn.Module):
    """[B, chans, H, W] -> [B, chans + growth_rate, H, W]: what came in, and what is made of it."""

    def __init__(self, chans: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        narrow = 4 * growth_rate  # the bottleneck
        self.new = nn.Sequential(*step(chans, narrow, 1, drop_rate), *step(narrow, growth_rate, 3, drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


class DenseNet(ConvNet):
    """A 3×3 convolution, three blocks of (depth - 4) / 6 layers, norm, ReLU, average pool, linear head.

    Huang et al. (2016, https://arxiv.org/abs/1608.06993): DenseNet-BC-depth-growth_rate; between blocks channels and
    sides are halved. 769,162 parameters at its defaults. The paper's dropout is 0.2 where images are not augmented.
    Weights start as He et al. (2015, https://arxiv.org/abs/1502.01852, normal, by a layer's outputs) propose.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W from 4 on.

    Raises:
        ValueError: a depth that is not 6n + 4.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(10, 2000)] = 100,
        growth_rate: Annotated[int, Range(1, 1024)] = 12,  # channels that a layer adds
        drop_rate: Annotated[float, Range(0, below=1)] = 0.0,  # after each convolution of the blocks
    ) -> None:
        if depth % 6 != 4:
            raise ValueError(f"depth={depth}: give 6n + 4, such as 40, 100 or 190")
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
