"""Residual networks, for images of 32×32: the six-n-plus-two of the paper, and ImageNet's with a small stem."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cifarnet.config import Range, checked
from cifarnet.models.normalize import Normalize

Width = Annotated[int, Range(1, 4096)]
Depth = Annotated[int, Range(8, 2000)]
Rate = Annotated[float, Range(0, below=1)]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # a stage


class Pad(nn.Module):
    """The shortcut that learns nothing: every stride-th pixel, and zeros in the channels that are new."""

    def __init__(self, new_chans: int, stride: int) -> None:
        super().__init__()
        self.new_chans, self.stride = new_chans, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_chans))


class Block(nn.Module):
    """x + residual(x): two 3×3 convolutions, or 1×1, 3×3, 1×1 around a bottleneck of a quarter of the channels.

    Norm and ReLU follow each convolution and the sum; with `preact` they come before each convolution instead, and a
    shortcut that changes the shape starts behind the first of them.
    """

    def __init__(self, chans: int, out: int, stride: int, bottleneck: bool, shortcut: str, preact: bool, drop: float):
        super().__init__()
        width = out // 4 if bottleneck else out
        shapes = [(chans, width, 3, stride), (width, out, 3, 1)]  # in, out, kernel, stride
        if bottleneck:
            shapes = [(chans, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        layers: list[nn.Module] = []
        for inner, outer, kernel, step in shapes:
            conv = nn.Conv2d(inner, outer, kernel, step, kernel // 2, bias=False)
            norm = nn.BatchNorm2d(inner if preact else outer)
            layers += [norm, nn.ReLU(inplace=True), conv] if preact else [conv, norm, nn.ReLU(inplace=True)]
        self.before = nn.Sequential(*layers[:2]) if preact else nn.Identity()
        self.residual = nn.Sequential(*(layers[2:] if preact else layers[:-1]))
        self.drop_path = StochasticDepth(drop, "row")
        self.after = nn.Identity() if preact else nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None  # the identity
        if stride > 1 or chans != out:
            norm = nn.Identity() if preact else nn.BatchNorm2d(out)
            projection = nn.Sequential(nn.Conv2d(chans, out, 1, stride, bias=False), norm)
            self.shortcut = Pad(out - chans, stride) if shortcut == "pad" else projection

    def forward(self, x: Tensor) -> Tensor:
        start = self.before(x)
        kept = x if self.shortcut is None else self.shortcut(start)
        return self.after(kept + self.drop_path(self.residual(start)))


def layers(
    in_chans: int, stem: int, blocks: Sequence[int], outs: Sequence[int], drop_path_rate: float, preact: bool, **kind
) -> nn.Sequential:
    """All between pixels and pooling: a stem, then stages, each but the first of which halves the image.

    Weights start as He et al. (2015, https://arxiv.org/abs/1502.01852, normal, by a layer's outputs) propose.
    """
    made: list[nn.Module] = [nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)]
    made += [] if preact else [nn.BatchNorm2d(stem), nn.ReLU(inplace=True)]
    chans, passed = stem, 0
    for stage, (count, out) in enumerate(zip(blocks, outs, strict=True)):
        for number in range(count):
            drop = drop_path_rate * passed / max(1, sum(blocks) - 1)  # rises from 0 in the first block
            made.append(Block(chans, out, 2 if stage and not number else 1, preact=preact, drop=drop, **kind))
            chans, passed = out, passed + 1
    made += [nn.BatchNorm2d(chans), nn.ReLU(inplace=True)] if preact else []
    for layer in (layer for block in made for layer in block.modules() if isinstance(layer, nn.Conv2d)):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*made)


class CifarResNet(nn.Module):
    """A 3×3 convolution, three stages of (depth - 2) / 6 blocks, global average pool, linear head.

    He et al. (2015, https://arxiv.org/abs/1512.03385, section 4.2); with `preact` as in He et al. (2016,
    https://arxiv.org/abs/1603.05027). 269,722 parameters at its defaults; with `shortcut="conv"` 272,474.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.

    Raises:
        ValueError: a depth that is not 6n + 2.
        UserError: a number out of its range.
    """

    @checked("model")
    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Depth = 20,
        width: Width = 16,  # channels of the first stage; each other one has twice as many
        shortcut: Literal["pad", "conv"] = "pad",  # where the shape changes: the paper's options A and B
        preact: bool = False,
        drop_path_rate: Rate = 0.0,  # of the last block
    ) -> None:
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth={depth}: give 6n + 2, such as 20, 32, 44, 56 or 110")
        if shortcut not in ("pad", "conv"):
            raise ValueError(f"shortcut={shortcut}: choose one of pad, conv")
        blocks, outs = [(depth - 2) // 6] * 3, [width, 2 * width, 4 * width]
        self.normalize = Normalize(in_chans)
        self.layers = layers(in_chans, width, blocks, outs, drop_path_rate, preact, shortcut=shortcut, bottleneck=False)
        self.head = nn.Linear(outs[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.normalize(images)).mean((2, 3)))


class ResNet(nn.Module):
    """ImageNet's networks on small images: the stem is one 3×3 convolution of stride 1, with no max pool behind it.

    He et al. (2015, https://arxiv.org/abs/1512.03385, table 1) with the stem, and the stride in the 3×3 convolution, of
    https://github.com/kuangliu/pytorch-cifar; with `preact` as in He et al. (2016, https://arxiv.org/abs/1603.05027),
    norm and ReLU before the pool included. 11,173,962 parameters at its defaults; with `preact` 11,172,170.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.

    Raises:
        ValueError: a depth that is not in the paper's table.
        UserError: a number out of its range.
    """

    @checked("model")
    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Depth = 18,
        width: Width = 64,  # of the first stage, inside its bottlenecks if it has them; each other one has twice that
        preact: bool = False,
        drop_path_rate: Rate = 0.0,  # of the last block
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth={depth}: choose one of {', '.join(map(str, BLOCKS))}")
        bottleneck = depth >= 50
        outs = [width * factor * (4 if bottleneck else 1) for factor in (1, 2, 4, 8)]
        self.normalize = Normalize(in_chans)
        self.layers = layers(
            in_chans, width, BLOCKS[depth], outs, drop_path_rate, preact, shortcut="conv", bottleneck=bottleneck
        )
        self.head = nn.Linear(outs[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.normalize(images)).mean((2, 3)))
