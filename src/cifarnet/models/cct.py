"""CCT: a compact transformer with a convolutional tokenizer and attention pooling."""

from typing import Annotated

import torch
from torch import Tensor, nn
from torchvision.ops import MLP, StochasticDepth

from cifarnet.models.normalize import Normalize
from cifarnet.models.vit import Attention, Count, Rate, Width, add_positions, drop_path_rates, initialize
from cifarnet.schema import Range


class Block(nn.Module):
    """Attention and an MLP, each with a residual connection, [B, N, C] -> [B, N, C].

    As in the authors' code, the second norm is applied to the sum itself, and the MLP's output is added to the
    normalized sum.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, drop_rate: float, attn_drop_rate: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.drop_path = StochasticDepth(drop_path_rate, "row")  # drops the branch of a whole image
        attention = Attention(width, num_heads, bias=False, drop_rate=attn_drop_rate)
        self.attention = nn.Sequential(nn.LayerNorm(width), attention, nn.Dropout(drop_rate))
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, [mlp_width, width], activation_layer=nn.GELU, dropout=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.drop_path(self.attention(x)))
        return x + self.drop_path(self.mlp(x))


class CCT(nn.Module):
    """CCT-depth/kernel×1 (Hassani et al., 2021, https://arxiv.org/abs/2104.05704): by default, CCT-7/3×1.

    A convolution and a max pool turn the image into tokens; positions are learned. Instead of a class token, learned
    attention pools the last tokens, as in https://github.com/SHI-Labs/Compact-Transformers. 3,760,139 parameters on
    32×32 images. At other image sizes the learned positions are interpolated.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_chans: int = 3,
        kernel_size: Annotated[int, Range(1, 63)] = 3,
        width: Width = 256,
        depth: Count = 7,
        num_heads: Count = 4,
        mlp_ratio: Annotated[float, Range(above=0, most=64)] = 2.0,
        drop_rate: Rate = 0.0,  # dropout after the positions, after attention and in the MLP
        attn_drop_rate: Rate = 0.1,  # dropout of the attention weights
        drop_path_rate: Rate = 0.1,  # rate of the last block; it rises from 0 in the first block
    ) -> None:
        super().__init__()
        self.normalize = Normalize(in_chans)
        convolution = nn.Conv2d(in_chans, width, kernel_size, padding=kernel_size // 2, bias=False)
        self.tokens = nn.Sequential(convolution, nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))
        side = (image_size + kernel_size // 2 * 2 - kernel_size) // 2 + 1
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        self.dropout = nn.Dropout(drop_rate)
        settings = (width, num_heads, int(width * mlp_ratio), drop_rate, attn_drop_rate)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(Block(*settings, rate) for rate in rates))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, 1)  # the weight of a token
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.positions, std=0.2)
        nn.init.kaiming_normal_(convolution.weight)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        x = add_positions(self.tokens(self.normalize(images)), self.positions)
        x = self.norm(self.blocks(self.dropout(x.flatten(2).mT)))
        return self.head((self.pool(x).softmax(1) * x).sum(1))
