"""VGG with batch norm, for small images."""

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range

WIDTHS = (64, 128, 256, 512, 512)  # channels of each stage
# the number of convolutions in each stage, by depth
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3×3 convolutions with batch norm and a 2×2 max pool, two hidden layers, and a linear head.

    Simonyan and Zisserman (2014, https://arxiv.org/abs/1409.1556), with hidden layers of 512 units instead of 4,096, as
    in https://github.com/chenyaofo/pytorch-cifar-models. 15,253,578 parameters with the default arguments. The last
    stage reduces 32×32 images to one pixel; the pixels of larger images are averaged.

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; any H and W.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: Literal[11, 13, 16, 19] = 16,  # layers with weights
        hidden: Annotated[int, Range(1, 65536)] = 512,
        drop_rate: Annotated[float, Range(0, below=1)] = 0.5,  # dropout after each hidden layer
    ) -> None:
        super().__init__()
        self.normalize = Normalize(in_chans)
        layers: list[nn.Module] = []
        chans = in_chans
        for width, count in zip(WIDTHS, DEPTHS[depth], strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(chans, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                chans = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            *(nn.Linear(chans, hidden), nn.ReLU(inplace=True), nn.Dropout(drop_rate)),
            *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(drop_rate)),
        )
        self.head = nn.Linear(hidden, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(self.features(self.normalize(images)), 1).flatten(1)
        return self.head(self.hidden(features))
