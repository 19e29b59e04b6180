"""A vision transformer for small images."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cifarnet.config import Range, checked
from cifarnet.models.normalize import Normalize

# B batch, N tokens, C width of a token, H heads
Share = Annotated[float, Range(0, below=1)]


class Attention(nn.Module):
    """[B, N, C] -> [B, N, C]: each token becomes a mean over all, weighted by how well they match."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, …]
        return self.proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_width: int, drop_rate: float, drop_path: float) -> None:
        super().__init__()
        dropout, self.drop_path = nn.Dropout(drop_rate), StochasticDepth(drop_path, "row")  # a whole branch an image
        self.attention = nn.Sequential(nn.LayerNorm(width, eps=1e-6), Attention(width, num_heads), dropout)
        self.mlp = nn.Sequential(
            *(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, mlp_width), nn.GELU(), dropout),
            *(nn.Linear(mlp_width, width), dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(x))
        return x + self.drop_path(self.mlp(x))


class ViT(nn.Module):
    """A ViT (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929) of the size of DeiT's tiny one.

    Width, depth, heads and drop path are those of DeiT-Ti (Touvron et al., 2020, https://arxiv.org/abs/2012.12877),
    without its distillation token, on patches of 4×4 pixels. 5,362,762 parameters at its defaults, on 32×32 images. At
    other image sizes the learned positions are interpolated.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; H and W multiples of
    patch_size.

    Raises:
        ValueError: an image size that is no multiple of the patch size, or a width that is none of the heads.
        UserError: a number out of its range.
    """

    @checked("model")
    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_chans: int = 3,
        patch_size: Annotated[int, Range(1, 4096)] = 4,
        width: Annotated[int, Range(1, 65536)] = 192,
        depth: Annotated[int, Range(1, 1024)] = 12,
        num_heads: Annotated[int, Range(1, 1024)] = 3,
        mlp_ratio: Annotated[float, Range(above=0, most=64)] = 4.0,
        drop_rate: Share = 0.0,  # dropout after attention and in the MLP
        drop_path_rate: Share = 0.1,  # of the last block; it rises from 0 in the first
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size}: images of {image_size} pixels cannot be cut into such patches")
        if width % num_heads:
            raise ValueError(f"width={width} is no multiple of num_heads={num_heads}")
        self.normalize = Normalize(in_chans)
        self.patches = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        side = image_size // patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        mlp_width = int(width * mlp_ratio)
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_width, drop_rate, rate) for rate in rates))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        for weights in (self.class_token, self.class_position, self.positions):
            nn.init.trunc_normal_(weights, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        x, positions = self.patches(self.normalize(images)), self.positions
        if x.shape[2:] != positions.shape[2:]:  # other images than `image_size` (data.train_sizes)
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic", antialias=True)
        x = (x + positions).flatten(2).mT
        x = torch.cat([(self.class_token + self.class_position).expand(x.shape[0], -1, -1), x], 1)  # len(x) would fix B
        return self.head(self.norm(self.blocks(x))[:, 0])
