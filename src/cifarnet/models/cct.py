"""CCT: a compact transformer whose tokens are a convolution's pixels, and which pools them by attention."""

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

    def __init__(self, width: int, num_heads: int, drop_rate: float) -> None:
        super().__init__()
        self.num_heads, self.drop_rate = num_heads, drop_rate
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, …]
        drop_rate = self.drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(queries, keys, values, dropout_p=drop_rate)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, around each of which its input is added.

    As in the authors' code, the second norm is of the sum itself: the MLP's output is added to what was normalised.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, drop_rate: float, attn_drop_rate: float, drop_path: float
    ) -> None:
        super().__init__()
        dropout, self.drop_path = nn.Dropout(drop_rate), StochasticDepth(drop_path, "row")  # a whole branch an image
        attention = Attention(width, num_heads, attn_drop_rate)
        self.attention = nn.Sequential(nn.LayerNorm(width), attention, dropout)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), dropout, nn.Linear(mlp_width, width), dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.drop_path(self.attention(x)))
        return x + self.drop_path(self.mlp(x))


class CCT(nn.Module):
    """CCT-depth/kernel×1 (Hassani et al., 2021, https://arxiv.org/abs/2104.05704): CCT-7/3×1 at its defaults.

    Tokens are what a convolution and a max pool leave of the image, positions are learned, and a learned attention over
    the last tokens pools them: no class token. As https://github.com/SHI-Labs/Compact-Transformers. 3,760,139
    parameters on 32×32 images. At other image sizes the learned positions are interpolated.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].

    Raises:
        ValueError: a width that is no multiple of the number of heads.
        UserError: a number out of its range.
    """

    @checked("model")
    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_chans: int = 3,
        kernel_size: Annotated[int, Range(1, 63)] = 3,
        width: Annotated[int, Range(1, 65536)] = 256,
        depth: Annotated[int, Range(1, 1024)] = 7,
        num_heads: Annotated[int, Range(1, 1024)] = 4,
        mlp_ratio: Annotated[float, Range(above=0, most=64)] = 2.0,
        drop_rate: Share = 0.0,  # dropout after the positions, after attention and in the MLP
        attn_drop_rate: Share = 0.1,  # of attention's weights
        drop_path_rate: Share = 0.1,  # of the last block; it rises from 0 in the first
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is no multiple of num_heads={num_heads}")
        self.normalize = Normalize(in_chans)
        convolution = nn.Conv2d(in_chans, width, kernel_size, padding=kernel_size // 2, bias=False)
        self.tokens = nn.Sequential(convolution, nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))
        side = (image_size + kernel_size // 2 * 2 - kernel_size) // 2 + 1
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        self.dropout = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        settings = (width, num_heads, int(width * mlp_ratio), drop_rate, attn_drop_rate)
        self.blocks = nn.Sequential(*(Block(*settings, rate) for rate in rates))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, 1)  # how much a token counts
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.positions, std=0.2)
        nn.init.kaiming_normal_(convolution.weight)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        x, positions = self.tokens(self.normalize(images)), self.positions
        if x.shape[2:] != positions.shape[2:]:  # other images than `image_size` (data.train_sizes)
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic", antialias=True)
        x = self.norm(self.blocks(self.dropout((x + positions).flatten(2).mT)))
        return self.head((self.pool(x).softmax(1) * x).sum(1))
