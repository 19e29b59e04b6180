"""The baseline: blocks of two convolutions and a max pool, a hidden layer, a linear head."""

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range

Width = Annotated[int, Range(1, 65536)]


class CNN(nn.Module):
    """Blocks of two 3×3 convolutions and a 2×2 max pool, one hidden layer, one output layer; no batch norm.

    2,168,362 parameters with the default arguments. Weights are initialized as in He et al. (2015, uniform,
    https://arxiv.org/abs/1502.01852); biases and the output layer start at zero, which keeps the first logits small.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]. If H and W differ
    from image_size, features are pooled to the size that the hidden layer expects.

    Raises:
        ValueError: the number of widths is odd.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_chans: int = 3,
        widths: Sequence[Width] = (32, 32, 64, 64),  # output channels of each convolution, two for each block
        hidden: Width = 512,
        drop_rate: Annotated[float, Range(0, below=1)] = 0.0,  # dropout after each pool and after the hidden layer
    ) -> None:
        super().__init__()
        if len(widths) % 2:
            raise ValueError(f"widths={list(widths)}: use an even number of widths, two for each block")
        self.normalize = Normalize(in_chans)
        self.pooled_size = image_size // 2 ** (len(widths) // 2)
        layers: list[nn.Module] = []
        channels = in_chans
        for first, second in zip(widths[::2], widths[1::2], strict=True):
            layers += [nn.Conv2d(channels, first, 3, padding="same"), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(first, second, 3, padding="same"), nn.MaxPool2d(2)]
            layers += [nn.ReLU(inplace=True), nn.Dropout(drop_rate)]  # after the pool, for fewer values
            channels = second
        self.features = nn.Sequential(*layers)
        flat = channels * self.pooled_size**2
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(inplace=True), nn.Dropout(drop_rate))
        self.head = nn.Linear(hidden, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(self.normalize(images))
        if features.shape[-1] != self.pooled_size:  # images of another size (data.train_sizes)
            features = F.adaptive_avg_pool2d(features, self.pooled_size)
        return self.head(self.hidden(features))
