"""From a class and its settings to a network that takes pixels."""

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cifarnet.errors import UserError
from cifarnet.models.normalize import Normalize


def construct(make: Callable[..., nn.Module], num_classes: int, image_size: int, **settings: Any) -> nn.Module:
    """The network that a class, or a function such as `torchvision.models.resnet18`, makes.

    It is told `num_classes` and `image_size` (in pixels) where it takes arguments of these names. One without a
    `Normalize` gets one in front, so that every network takes uint8 images [B, C, H, W]. Layers of torch's that are
    lazy get their size from an image.
    """
    declared = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in declared.values())
    task = {"num_classes": num_classes} if "num_classes" in declared or takes_any else {}
    task |= {"image_size": image_size} if "image_size" in declared else {}
    network = make(**(task | settings))
    if not isinstance(network, nn.Module):
        raise TypeError(f"makes a {type(network).__name__}, where a Module is needed")
    if not any(isinstance(layer, Normalize) for layer in network.modules()):
        network = nn.Sequential(OrderedDict(normalize=Normalize(), network=network))
    if any(map(is_lazy, itertools.chain(network.parameters(), network.buffers()))):
        training = [layer for layer in network.modules() if layer.training]
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        for layer in training:  # not those that the network itself keeps in eval mode
            layer.training = True
    return network


@torch.no_grad()
def try_on(network: nn.Module, sizes: Iterable[int], num_classes: int, name: str = "model") -> None:
    """Show it a blank image of each size, in pixels, that it is to be trained or tested on.

    Raises:
        UserError: it fails, or gives something else than logits [1, num_classes].
    """
    network = copy.deepcopy(network).eval()  # the network itself stays as it was made
    for size in sorted(sizes):
        what = f"{name}: of an image of {size}x{size} pixels (as the data has them, or data.train_sizes)"
        try:
            logits = network(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except Exception as error:  # whatever its layers raise
            raise UserError(f"{what} it can make nothing: {' '.join(str(error).split())}") from error
        if getattr(logits, "shape", None) != (1, num_classes):
            made = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{what} it makes {made}; expected logits [1, {num_classes}], one a class.")
