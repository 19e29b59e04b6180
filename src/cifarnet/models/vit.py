"""A vision transformer for small images."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP, StochasticDepth

from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range

# B batch, N tokens, C channels of a token, H heads
Width = Annotated[int, Range(1, 65536)]
Count = Annotated[int, Range(1, 1024)]
Rate = Annotated[float, Range(0, below=1)]


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, C] -> [B, N, C]; `drop_rate` is the dropout rate of the attention weights.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, bias: bool = True, drop_rate: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.drop_rate = num_heads, drop_rate
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, …]
        drop_rate = self.drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(queries, keys, values, dropout_p=drop_rate)
        return self.proj(x.transpose(1, 2).flatten(2))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rate of each block, from 0 in the first block to `last` in the last block."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def initialize(network: nn.Module) -> None:
    """Draw the weights of linear layers from a truncated normal distribution; biases start at zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def add_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Add learned positions [1, C, H, W] to features [B, C, H', W'], interpolated if the sizes differ."""
    if x.shape[2:] != positions.shape[2:]:  # images whose size is not `image_size` (data.train_sizes)
        positions = F.interpolate(positions, x.shape[2:], mode="bicubic", antialias=True)
    return x + positions


class Block(nn.Module):
    """Attention and an MLP, each after a norm and with a residual connection, [B, N, C] -> [B, N, C]."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, drop_rate: float, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path = StochasticDepth(drop_path_rate, "row")  # drops the branch of a whole image
        attention = Attention(width, num_heads)
        self.attention = nn.Sequential(nn.LayerNorm(width, eps=1e-6), attention, nn.Dropout(drop_rate))
        mlp = MLP(width, [mlp_width, width], activation_layer=nn.GELU, dropout=drop_rate)
        self.mlp = nn.Sequential(nn.LayerNorm(width, eps=1e-6), *mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(x))
        return x + self.drop_path(self.mlp(x))


class ViT(nn.Module):
    """A ViT (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929) with the size of DeiT-Ti.

    The width, depth, heads and drop path are as in DeiT-Ti (Touvron et al., 2020, https://arxiv.org/abs/2012.12877),
    without its distillation token, on patches of 4×4 pixels. 5,362,762 parameters with the default arguments. At
    other image sizes the learned positions are interpolated.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; H and W are multiples of
    patch_size.

    Raises:
        ValueError: `image_size` is not a multiple of `patch_size`, or `width` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_chans: int = 3,
        patch_size: Annotated[int, Range(1, 4096)] = 4,
        width: Width = 192,
        depth: Count = 12,
        num_heads: Count = 3,
        mlp_ratio: Annotated[float, Range(above=0, most=64)] = 4.0,
        drop_rate: Rate = 0.0,  # dropout after attention and in the MLP
        drop_path_rate: Rate = 0.1,  # rate of the last block; it rises from 0 in the first block
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
        self.normalize = Normalize(in_chans)
        self.patches = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        side = image_size // patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        mlp_width = int(width * mlp_ratio)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_width, drop_rate, rate) for rate in rates))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        for weights in (self.class_token, self.class_position, self.positions):
            nn.init.trunc_normal_(weights, std=0.02)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = add_positions(self.patches(self.normalize(images)), self.positions).flatten(2).mT
        x = torch.cat([(self.class_token + self.class_position).expand(x.shape[0], -1, -1), x], 1)  # len(x) would fix B
        return self.head(self.norm(self.blocks(x))[:, 0])
