"""Grad-CAM: the parts of an image that support a network's prediction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return how strongly each part of an image supports a class, float [B, H, W] from 0 to 1.

    Grad-CAM (Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391) weights the last feature maps by the mean
    gradient of the class's logit and keeps the positive part. The feature maps are the last output with a square grid
    on which the logit depends: the output [B, C, side, side] of any layer, or the output of a layer norm with tokens
    [B, side², C], with or without a class token in front.

    Args:
        network: a network in eval mode: images, float [B, C, H, W] in [0, 1] -> logits [B, num_classes].
        images: uint8 [B, C, H, W].
        classes: int64 [B].

    Returns:
        Maps with a maximum of 1. A map is zero if no part of the image supports the class, or if the network has no
        such layer.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and (output.ndim == 4 or isinstance(module, nn.LayerNorm)):
            outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        with torch.enable_grad():
            logits = network((images.float() / 255).requires_grad_())  # the network's weights may be frozen
            scores = logits.gather(1, classes[:, None]).sum()
            for output in reversed(outputs):
                maps = _as_grid(output.detach())
                if maps is None or not output.requires_grad:
                    continue
                (gradient,) = torch.autograd.grad(scores, output, retain_graph=True, allow_unused=True)
                gradients = None if gradient is None else _as_grid(gradient)
                if gradients is not None and gradients.any():
                    support = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
                    support = F.interpolate(support, images.shape[2:], mode="bilinear")[:, 0]
                    return support / support.amax((1, 2), keepdim=True).clamp_min(1e-30)
    finally:
        for handle in handles:
            handle.remove()
    return torch.zeros(len(images), *images.shape[2:])


def _as_grid(features: Tensor) -> Tensor | None:
    """Return features [B, C, side, side], or tokens [B, side² or side² + 1, C], as a grid [B, C, side, side].

    Return None for any other shape, and for a grid with a single cell.
    """
    if features.ndim == 3:
        side = math.isqrt(features.shape[1])
        if features.shape[1] not in (side**2, side**2 + 1):
            return None
        features = features[:, -(side**2) :].mT.unflatten(2, (side, side))
    if features.ndim != 4 or features.shape[2] != features.shape[3] or features.shape[3] < 2:
        return None
    return features
