"""Residual networks for small images: ResNet, pre-activation ResNet, Wide ResNet, ResNeXt."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range

Width = Annotated[int, Range(1, 4096)]
Rate = Annotated[float, Range(0, below=1)]
Stage = tuple[int, int, int]  # the numbers of blocks, of channels inside a block, and of output channels
# the number of blocks in each stage, by depth
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Block(nn.Module):
    """x + residual(x), where the residual is two 3×3 convolutions or a bottleneck of 1×1, 3×3 and 1×1 convolutions.

    Each convolution and the sum are followed by a norm and a ReLU. With `preact`, norm and ReLU precede each
    convolution instead, and a shortcut that changes the shape starts after the first norm and ReLU.

    Args:
        chans, width, out: the number of channels of the input, between the convolutions, and of the output.
        groups: the number of groups of the bottleneck's 3×3 convolution.
        shortcut: "conv" or "pad", if the shape changes; otherwise the shortcut is the identity. "pad" subsamples the
            pixels and appends channels of zeros.
        drop_rate: the rate of the dropout before the last convolution; None adds no dropout layer.
        drop_path_rate: the probability that the residual of an image is dropped in training.
    """

    def __init__(
        self,
        chans: int,
        width: int,
        out: int,
        stride: int,
        *,
        bottleneck: bool = False,
        groups: int = 1,
        preact: bool = False,
        shortcut: str = "conv",
        drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        shapes = [(chans, width, 3, stride, 1), (width, out, 3, 1, 1)]  # in, out, kernel size, stride, groups
        if bottleneck:
            shapes = [(chans, width, 1, 1, 1), (width, width, 3, stride, groups), (width, out, 1, 1, 1)]
        layers: list[nn.Module] = []
        for before, after, kernel_size, step, group_count in shapes:
            conv = nn.Conv2d(before, after, kernel_size, step, kernel_size // 2, groups=group_count, bias=False)
            norm = nn.BatchNorm2d(before if preact else after)
            layers += [norm, nn.ReLU(inplace=True), conv] if preact else [conv, norm, nn.ReLU(inplace=True)]
        if drop_rate is not None:
            layers.insert(-1 if preact else -3, nn.Dropout(drop_rate))
        self.before = nn.Sequential(*layers[:2]) if preact else nn.Identity()
        self.residual = nn.Sequential(*(layers[2:] if preact else layers[:-1]))
        self.drop_path = StochasticDepth(drop_path_rate, "row")
        self.after = nn.Identity() if preact else nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None  # the identity
        if stride > 1 or chans != out:
            norm = nn.Identity() if preact else nn.BatchNorm2d(out)
            projection = nn.Sequential(nn.Conv2d(chans, out, 1, stride, bias=False), norm)
            padding = nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, 0, out - chans)))
            self.shortcut = padding if shortcut == "pad" else projection

    def forward(self, x: Tensor) -> Tensor:
        start = self.before(x)
        kept = x if self.shortcut is None else self.shortcut(start)
        return self.after(kept + self.drop_path(self.residual(start)))


def residual_layers(
    in_chans: int, stem: int, stages: Sequence[Stage], drop_path_rate: float, preact: bool = False, **settings: Any
) -> nn.Sequential:
    """Return a 3×3 convolution and stages of residual blocks; each stage but the first halves height and width.

    Args:
        stem: the number of channels of the first convolution.
        drop_path_rate: the rate of the last block; it rises linearly from 0 in the first block.
        settings: the other arguments of `Block`.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)]
    if not preact:
        layers += [nn.BatchNorm2d(stem), nn.ReLU(inplace=True)]
    chans, index = stem, 0
    last = max(1, sum(count for count, _, _ in stages) - 1)
    for stage, (count, width, out) in enumerate(stages):
        for number in range(count):
            stride = 2 if stage and not number else 1
            rate = drop_path_rate * index / last
            layers.append(Block(chans, width, out, stride, preact=preact, drop_path_rate=rate, **settings))
            chans, index = out, index + 1
    if preact:
        layers += [nn.BatchNorm2d(chans), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def initialize(layers: nn.Module) -> None:
    """Initialize convolutions as in He et al. (2015, https://arxiv.org/abs/1502.01852): normal, fan-out."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class ConvNet(nn.Module):
    """Convolutional layers, global average pool, linear head.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.
    """

    def __init__(self, num_classes: int, in_chans: int, layers: nn.Sequential, chans: int) -> None:
        super().__init__()
        self.normalize = Normalize(in_chans)
        self.layers = layers
        self.head = nn.Linear(chans, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.normalize(images)).mean((2, 3)))


class CifarResNet(ConvNet):
    """A 3×3 convolution, three stages of (depth - 2) / 6 blocks, global average pool, linear head.

    He et al. (2015, https://arxiv.org/abs/1512.03385, section 4.2); with `preact` as in He et al. (2016,
    https://arxiv.org/abs/1603.05027). 269,722 parameters with the default arguments; with `shortcut="conv"` 272,474.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(8, 2000)] = 20,
        width: Width = 16,  # channels of the first stage; each further stage doubles them
        shortcut: Literal["pad", "conv"] = "pad",  # if the shape changes: the paper's options A and B
        preact: bool = False,
        drop_path_rate: Rate = 0.0,  # rate of the last block
    ) -> None:
        if depth % 6 != 2:
            raise ValueError(f"depth={depth}: use 6n + 2, such as 20, 32, 44, 56 or 110")
        stages = [((depth - 2) // 6, width * factor, width * factor) for factor in (1, 2, 4)]
        layers = residual_layers(in_chans, width, stages, drop_path_rate, preact, shortcut=shortcut)
        initialize(layers)
        super().__init__(num_classes, in_chans, layers, 4 * width)


class ResNet(ConvNet):
    """An ImageNet ResNet for small images: the stem is one 3×3 convolution of stride 1 without a max pool.

    He et al. (2015, https://arxiv.org/abs/1512.03385, table 1) with the stem, and the stride in the 3×3 convolution, as
    in https://github.com/kuangliu/pytorch-cifar; with `preact` as in He et al. (2016,
    https://arxiv.org/abs/1603.05027), including the norm and ReLU before the pool. 11,173,962 parameters with the
    default arguments; with `preact` 11,172,170.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Literal[18, 34, 50, 101, 152] = 18,
        width: Width = 64,  # channels of the first stage (inside its bottlenecks); each further stage doubles them
        preact: bool = False,
        drop_path_rate: Rate = 0.0,  # rate of the last block
    ) -> None:
        bottleneck = depth >= 50
        expansion = 4 if bottleneck else 1
        widths = [width * factor for factor in (1, 2, 4, 8)]
        stages = [(count, inner, inner * expansion) for count, inner in zip(BLOCKS[depth], widths, strict=True)]
        layers = residual_layers(in_chans, width, stages, drop_path_rate, preact, bottleneck=bottleneck)
        initialize(layers)
        super().__init__(num_classes, in_chans, layers, 8 * width * expansion)


class WideResNet(ConvNet):
    """A 3×3 convolution to 16 channels, three stages of (depth - 4) / 6 blocks, norm, ReLU, average pool, linear head.

    Zagoruyko & Komodakis (2016, https://arxiv.org/abs/1605.07146): WRN-depth-width. 36,479,194 parameters with the
    default arguments. If the paper uses dropout, its rate is 0.3.

    Raises:
        ValueError: `depth` is not 6n + 4.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(10, 2000)] = 28,
        width: Annotated[int, Range(1, 256)] = 10,  # the factor by which stages are wider than 16, 32, 64 channels
        drop_rate: Rate = 0.0,  # dropout between a block's convolutions
        drop_path_rate: Rate = 0.0,  # rate of the last block
    ) -> None:
        if depth % 6 != 4:
            raise ValueError(f"depth={depth}: use 6n + 4, such as 16, 28 or 40")
        stages = [((depth - 4) // 6, chans * width, chans * width) for chans in (16, 32, 64)]
        layers = residual_layers(in_chans, 16, stages, drop_path_rate, preact=True, drop_rate=drop_rate)
        super().__init__(num_classes, in_chans, layers, 64 * width)
        initialize(self.layers)


class ResNeXt(ConvNet):
    """A 3×3 convolution to 64 channels, three stages of (depth - 2) / 9 bottlenecks, average pool, linear head.

    Xie et al. (2016, https://arxiv.org/abs/1611.05431, section 5.3): ResNeXt-depth, cardinality × base_width d, stages
    of 256, 512 and 1,024 channels. 34,426,698 parameters with the default arguments (29, 8×64d).

    Raises:
        ValueError: `depth` is not 9n + 2.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Annotated[int, Range(11, 2000)] = 29,
        cardinality: Annotated[int, Range(1, 1024)] = 8,  # groups of the 3×3 convolutions
        base_width: Annotated[int, Range(1, 1024)] = 64,  # channels per group in the first stage, then doubled
        drop_path_rate: Rate = 0.0,  # rate of the last block
    ) -> None:
        if depth % 9 != 2:
            raise ValueError(f"depth={depth}: use 9n + 2, such as 20, 29 or 38")
        width = cardinality * base_width
        stages = [((depth - 2) // 9, width * factor, 256 * factor) for factor in (1, 2, 4)]
        layers = residual_layers(in_chans, 64, stages, drop_path_rate, bottleneck=True, groups=cardinality)
        super().__init__(num_classes, in_chans, layers, 1024)
        initialize(self.layers)
