"""Wide residual networks: few blocks with many channels, norm and ReLU before each convolution."""

from typing import Annotated

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cifarnet.config import Range, checked
from cifarnet.models.normalize import Normalize

Rate = Annotated[float, Range(0, below=1)]


class Block(nn.Module):
    """x + residual(x), dropout before the second convolution; a projection starts behind the first norm and ReLU."""

    def __init__(self, chans: int, out: int, stride: int, drop_rate: float, drop_path_rate: float) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(chans), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            nn.Conv2d(chans, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.drop_path = StochasticDepth(drop_path_rate, "row")
        self.projection = nn.Conv2d(chans, out, 1, stride, bias=False) if stride > 1 or chans != out else None

    def forward(self, x: Tensor) -> Tensor:
        start = self.before(x)
        kept = x if self.projection is None else self.projection(start)
        return kept + self.drop_path(self.residual(start))


class WideResNet(nn.Module):
    """A 3×3 convolution to 16 channels, three stages of (depth - 4) / 6 blocks, norm, ReLU, average pool, linear head.

    Zagoruyko & Komodakis (2016, https://arxiv.org/abs/1605.07146): WRN-depth-width. 36,479,194 parameters at its
    defaults. The paper's dropout is 0.3 (0 where images are augmented and nothing is said); weights start as He et al.
    (2015, https://arxiv.org/abs/1502.01852, normal, by a layer's outputs) propose.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.

    Raises:
        ValueError: a depth that is not 6n + 4.
        UserError: a number out of its range.
    """

    @checked("model")
    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(10, 2000)] = 28,
        width: Annotated[int, Range(1, 256)] = 10,  # the factor by which stages are wider than 16, 32, 64 channels
        drop_rate: Rate = 0.0,  # between a block's convolutions
        drop_path_rate: Rate = 0.0,  # of the last block
    ) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"depth={depth}: give 6n + 4, such as 16, 28 or 40")
        self.normalize = Normalize(in_chans)
        layers: list[nn.Module] = [nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)]
        chans, count = 16, (depth - 4) // 6
        for stage in range(3):
            for number in range(count):
                out, stride = 16 * 2**stage * width, 2 if stage and not number else 1
                passed = (stage * count + number) / (3 * count - 1)
                layers.append(Block(chans, out, stride, drop_rate, drop_path_rate * passed))
                chans = out
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(chans), nn.ReLU(inplace=True))
        self.head = nn.Linear(chans, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.normalize(images)).mean((2, 3)))
