"""From a class and its settings to a network that takes pixels."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from cifarnet.models.normalize import Normalize


def construct(make: Callable[..., nn.Module], num_classes: int, image_size: int, **settings: Any) -> nn.Module:
    """The network that a class, or a function such as `torchvision.models.resnet18`, makes.

    It is told `num_classes` and `image_size` (in pixels) where it takes arguments of these names. One without a
    `Normalize` gets one in front, so that every network takes uint8 images [B, C, H, W].
    """
    declared = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in declared.values())
    task = {"num_classes": num_classes} if "num_classes" in declared or takes_any else {}
    task |= {"image_size": image_size} if "image_size" in declared else {}
    network = make(**(task | settings))
    if not isinstance(network, nn.Module):
        raise TypeError(f"makes a {type(network).__name__}, where a Module is needed")
    if any(isinstance(layer, Normalize) for layer in network.modules()):
        return network
    return nn.Sequential(OrderedDict(normalize=Normalize(), network=network))
