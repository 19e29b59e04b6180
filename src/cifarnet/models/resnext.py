"""ResNeXt: residual networks whose bottlenecks are many narrow ones side by side."""

from typing import Annotated

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cifarnet.config import Range, checked
from cifarnet.models.normalize import Normalize

Width = Annotated[int, Range(1, 1024)]


class Block(nn.Module):
    """relu(x + residual(x)): 1×1, grouped 3×3 and 1×1 convolutions, each with a norm."""

    def __init__(self, chans: int, width: int, out: int, groups: int, stride: int, drop_path_rate: float) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(chans, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.drop_path = StochasticDepth(drop_path_rate, "row")
        self.shortcut = nn.Sequential()  # the identity
        if stride > 1 or chans != out:
            self.shortcut = nn.Sequential(nn.Conv2d(chans, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.drop_path(self.residual(x)))


class ResNeXt(nn.Module):
    """A 3×3 convolution to 64 channels, three stages of (depth - 2) / 9 blocks, average pool, linear head.

    Xie et al. (2016, https://arxiv.org/abs/1611.05431, section 5.3): ResNeXt-depth, cardinality × base_width d, stages
    of 256, 512 and 1,024 channels. 34,426,698 parameters at its defaults, 29, 8×64d. Weights start as He et al. (2015,
    https://arxiv.org/abs/1502.01852, normal, by a layer's outputs) propose.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.

    Raises:
        ValueError: a depth that is not 9n + 2.
        UserError: a number out of its range.
    """

    @checked("model")
    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(11, 2000)] = 29,
        cardinality: Width = 8,  # groups of the 3×3 convolutions
        base_width: Width = 64,  # channels of a group in the first stage; each other one has twice as many
        drop_path_rate: Annotated[float, Range(0, below=1)] = 0.0,  # of the last block
    ) -> None:
        super().__init__()
        if depth % 9 != 2:
            raise ValueError(f"depth={depth}: give 9n + 2, such as 20, 29 or 38")
        self.normalize = Normalize(in_chans)
        layers: list[nn.Module] = [nn.Conv2d(in_chans, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)]
        layers.append(nn.ReLU(inplace=True))
        chans, count = 64, (depth - 2) // 9
        for stage in range(3):
            width, out = cardinality * base_width * 2**stage, 256 * 2**stage
            for number in range(count):
                stride, passed = 2 if stage and not number else 1, (stage * count + number) / (3 * count - 1)
                layers.append(Block(chans, width, out, cardinality, stride, drop_path_rate * passed))
                chans = out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(chans, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.normalize(images)).mean((2, 3)))
