"""Where in a picture a network looked."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place of an image speaks for a class, float [B, H, W] from 0 to 1, the strongest at 1.

    Grad-CAM (Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391): the last features that the network has of every
    place, each weighted with how much the class's logit grows with it; what speaks against is left out. The features
    are those that a layer gives as a square grid, or that a layer norm gives as the tokens of one, with or without a
    class token before them; of them the last on which, at any place, the logit depends.

    Args:
        network: images, float [B, C, H, W] in [0, 1] -> logits [B, num_classes]; in eval mode.
        images: uint8 [B, C, H, W].
        classes: int64 [B].

    Returns:
        0 everywhere for an image where nothing speaks for the class, and for all if the network has no such layer.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: object) -> None:
        told = isinstance(output, Tensor) and (output.ndim == 4 or isinstance(module, nn.LayerNorm))
        if told and output.requires_grad and _by_place(output) is not None:
            kept.append(output)

    handles = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        with torch.enable_grad():
            logits = network((images.float() / 255).requires_grad_())  # whatever else is frozen
            scores = logits.gather(1, classes[:, None]).sum()
            for features in reversed(kept):
                (gradient,) = torch.autograd.grad(scores, features, retain_graph=True, allow_unused=True)
                if gradient is not None and _by_place(gradient).any():
                    weights = _by_place(gradient).mean((2, 3), keepdim=True)
                    strength = (weights * _by_place(features.detach())).sum(1, keepdim=True).relu()
                    strength = F.interpolate(strength, images.shape[2:], mode="bilinear")[:, 0]
                    return strength / strength.amax((1, 2), keepdim=True).clamp_min(1e-30)
    finally:
        for handle in handles:
            handle.remove()
    return torch.zeros(len(images), *images.shape[2:])


def _by_place(features: Tensor) -> Tensor | None:
    """[B, C, side, side] of a grid, or of its tokens [B, side² or side² + 1, C]; None of what is none, or one place."""
    if features.ndim == 3:
        side = math.isqrt(features.shape[1])
        if features.shape[1] not in (side**2, side**2 + 1):
            return None
        features = features[:, -(side**2) :].mT.unflatten(2, (side, side))
    if features.ndim != 4 or features.shape[2] != features.shape[3] or features.shape[3] < 2:
        return None
    return features
