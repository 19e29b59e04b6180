"""The first layer of every network, which scales and standardizes pixel values."""

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Scale uint8 images to [0, 1] and standardize each channel.

    The mean and standard deviation are buffers, which checkpoints contain, so a trained network takes plain pixels.
    They are 0 and 1 until `fit` is called.

    Shapes: images [B, C, H, W], uint8 or floating point in [0, 1] -> float [B, C, H, W].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_chans, 1, 1))
        self.register_buffer("std", torch.ones(in_chans, 1, 1))

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation of each channel, [C], on a scale from 0 to 1."""
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(torch.where(std > 1e-6, std, 1).view_as(self.std))  # constant channels are not scaled

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4:
            raise ValueError(f"Images of shape {list(images.shape)}: use a batch [B, C, H, W], such as image[None].")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images - self.mean) / self.std
