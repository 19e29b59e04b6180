"""A 3×3 convolution with a faster backward pass on CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = 8  # pixels; longer rows do not become faster
ROW = 64  # pixels; the maximum width of packed images


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d(…, 3, padding=1, bias=False)` with a faster gradient of the weight on CPUs.

    oneDNN adds the gradient of each image row to the whole gradient of the weight. These additions dominate if rows are
    short and there are many channels, as in the last layers. Packing several images side by side, with a column of
    zeros after each, makes rows longer.

    Shapes: [B, in_channels, H, W] -> [B, out_channels, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, side_by_side: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.side_by_side = side_by_side

    def forward(self, input: Tensor) -> Tensor:
        if not self.side_by_side or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            input, weight = input.to(dtype), weight.to(dtype)
        return _SideBySide.apply(input, weight)


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        for_images, for_weight = ctx.needs_input_grad
        image_gradient = _backward(gradient, images, weight, 0) if for_images else None
        if not for_weight:
            return image_gradient, None
        width = images.shape[-1]
        fitting = ROW // (width + 1) if width < SHORT else 1
        count = next(number for number in range(fitting, 0, -1) if len(images) % number == 0)
        if count > 1:
            gradient, images = _side_by_side(gradient, count), _side_by_side(images, count)
        return image_gradient, _backward(gradient, images, weight, 1)


def _backward(gradient: Tensor, images: Tensor, weight: Tensor, which: int) -> Tensor:
    """Return the gradient of the images (`which` is 0) or of the weight (1)."""
    arguments = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [which == 0, which == 1, False])  # stride, padding, …
    return torch.ops.aten.convolution_backward(gradient, images, weight, None, *arguments)[which]


def _side_by_side(images: Tensor, count: int) -> Tensor:
    """[B, C, H, W] -> [B / count, C, H, count × (W + 1)], channels_last, with a column of zeros after each image."""
    batch, chans, height, width = images.shape
    packed = images.new_zeros(batch // count, height, count, width + 1, chans)
    packed[..., :width, :] = images.permute(0, 2, 3, 1).view(-1, count, height, width, chans).transpose(1, 2)
    return packed.flatten(2, 3).permute(0, 3, 1, 2)
