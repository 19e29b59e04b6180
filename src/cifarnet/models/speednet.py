"""SpeedNet: a fixed whitening layer and six convolutions, as in the fastest known training recipes."""

import itertools
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifarnet.models.convolution import Conv3x3
from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range


class Whiten(nn.Module):
    """A fixed convolution that whitens small patches of the training images, so that their second moment is near
    the identity.

    The filters are the eigenvectors of the patches' uncentered second moment, divided by √(eigenvalue + eps), followed
    by the negated filters, so that an activation that passes one sign loses no information (Page, 2018; Jordan, 2024,
    https://arxiv.org/abs/2404.00498). The layer has no parameters and needs no gradient.

    Shapes: [B, C, H, W] -> [B, 2 × C × kernel_size², H - kernel_size + 1, W - kernel_size + 1].
    """

    filters: Tensor

    def __init__(self, in_chans: int = 3, kernel_size: int = 2, eps: float = 5e-4) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("filters", torch.zeros(2 * in_chans * kernel_size**2, in_chans, kernel_size, kernel_size))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the filters from normalized images, float [N, C, H, W]; a few thousand are enough."""
        half, (chans, size) = len(self.filters) // 2, self.filters.shape[1:3]
        patches = F.unfold(images, size).transpose(1, 2).reshape(-1, chans * size**2)  # one per row
        second_moment = (patches.T @ patches).double() / len(patches)
        eigenvalues, eigenvectors = torch.linalg.eigh(second_moment)
        filters = (eigenvectors / (eigenvalues + self.eps).sqrt()).T.view(half, chans, size, size)
        self.filters.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.filters)


class Block(nn.Module):
    """Convolution, max pool, norm and GELU, then convolution, norm and GELU."""

    def __init__(self, in_chans: int, out_chans: int, side_by_side: bool) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_chans, out_chans, side_by_side)
        self.norm1 = nn.BatchNorm2d(out_chans, eps=1e-12)
        self.conv2 = Conv3x3(out_chans, out_chans, side_by_side)
        self.norm2 = nn.BatchNorm2d(out_chans, eps=1e-12)
        for conv in (self.conv1, self.conv2):  # partial identity: at the start, the input passes through
            nn.init.dirac_(conv.weight.data[: conv.in_channels])
        for norm in (self.norm1, self.norm2):  # norms learn a shift but no scale
            norm.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class SpeedNet(nn.Module):
    """Whitened patches, three blocks of two convolutions, global max pool, linear head.

    The network is based on airbench94_muon (Jordan, 2024, https://github.com/KellerJordan/cifar10-airbench), with two
    differences: the whitening layer has no bias, so that no gradient passes the first activation, and small initial
    weights of the head replace a factor on the logits. 1,971,328 parameters with the default arguments. Training can
    start with small images (`data.train_sizes`).

    Shapes: images [B, in_chans, H, W], uint8 or float in [0, 1] -> logits [B, num_classes]; H and W are at least 16.

    Raises:
        ValueError: `image_size` is less than 16.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_chans: int = 3,
        widths: Sequence[Annotated[int, Range(1, 65536)]] = (64, 256, 256),  # channels of each block
        whiten_kernel_size: Annotated[int, Range(1, 15)] = 2,
        side_by_side: bool = True,  # faster gradients on CPUs (see Conv3x3)
    ) -> None:
        super().__init__()
        if image_size < 16:
            raise ValueError(f"image_size={image_size} is too small: use at least 16")
        self.normalize = Normalize(in_chans)
        self.whiten = Whiten(in_chans, whiten_kernel_size)
        chans = [len(self.whiten.filters), *widths]
        self.blocks = nn.Sequential(*(Block(i, o, side_by_side) for i, o in itertools.pairwise(chans)))
        self.head = nn.Linear(chans[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / chans[-1])

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the whitening filters from images, uint8 [N, in_chans, H, W], after `normalize` is fitted."""
        self.whiten.fit(self.normalize(images))

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(self.normalize(images))))
        # not amax, whose gradient is NaN if it is compiled in bfloat16
        return self.head(F.max_pool2d(x, x.shape[2:]).flatten(1))
