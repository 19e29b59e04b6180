"""Build a network that takes pixels from a class and its settings."""

import contextlib
import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.parameter import is_lazy

from cifarnet.errors import UserError, reason
from cifarnet.models.normalize import Normalize


def construct(make: Callable[..., nn.Module], num_classes: int, image_size: int, **settings: Any) -> nn.Module:
    """Build a network by calling a class, or a function such as `torchvision.models.resnet18`.

    `num_classes` and `image_size` (in pixels) are passed if `make` takes arguments with these names. A network without
    a `Normalize` layer gets one as its first layer, so that every network takes uint8 images [B, C, H, W]. Lazy layers
    of torch are initialized by a forward pass.
    """
    chosen = (getattr(make, "keywords", {}) | settings).get("num_classes", num_classes)  # of a functools.partial
    if chosen != num_classes:
        raise ValueError(f"num_classes={chosen}, but the data has {num_classes} classes")
    parameters = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    task = {"num_classes": num_classes} if "num_classes" in parameters or takes_any else {}
    task |= {"image_size": image_size} if "image_size" in parameters else {}
    network = make(**(task | settings))
    if not isinstance(network, nn.Module):
        raise TypeError(f"a {type(network).__name__} is not a torch.nn.Module")
    if not any(isinstance(layer, Normalize) for layer in network.modules()):
        network = nn.Sequential(OrderedDict(normalize=Normalize(), network=network))
    if any(map(is_lazy, itertools.chain(network.parameters(), network.buffers()))):
        training = [layer for layer in network.modules() if layer.training]
        with torch.no_grad():
            network.eval()(blank_image(image_size))
        for layer in training:  # not `train()`, which would change layers that the network keeps in eval mode
            layer.training = True
    return network


@contextlib.contextmanager
def limited(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop the construction of a network with a ValueError if it has far more layers or values than these weights,
    several of which may share their values."""
    parts = iter(range(1000 + 10 * len(weights)))
    storages = ((value.untyped_storage(), value.itemsize) for value in weights.values())
    stored = {storage.data_ptr(): storage.nbytes() // itemsize for storage, itemsize in storages}
    left = 10**7 + 2 * sum(stored.values())

    def count(layer: nn.Module, name: str, part: Any) -> None:
        nonlocal left
        takes_memory = isinstance(part, Tensor) and not is_lazy(part) and not part.is_meta
        left -= part.numel() if takes_memory else 0
        if left < 0 or next(parts, None) is None:
            raise ValueError("it is larger than its weights")

    with (
        modules.register_module_buffer_registration_hook(count),
        modules.register_module_module_registration_hook(count),
        modules.register_module_parameter_registration_hook(count),
    ):
        yield


@torch.no_grad()
def check_output(network: nn.Module, sizes: Iterable[int], num_classes: int, name: str = "The model") -> None:
    """Run the network on a blank image of each size (in pixels) on which it will be trained or tested.

    Raises:
        UserError: the network fails, or does not return logits [1, num_classes].
    """
    network = copy.deepcopy(network).eval()  # the network itself is not changed
    for size in sorted(sizes):
        task = f"{size}×{size} input (data.image_size, or one of data.train_sizes)"
        try:
            logits = network(blank_image(size))
        except Exception as error:  # layers may raise any type
            problem = f"{name} fails on a {task}: {reason(error)}."
            raise UserError(f"{problem} Correct the network, or choose another size.") from error
        if getattr(logits, "shape", None) != (1, num_classes):
            output = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            expected = f"expected logits [1, {num_classes}]. Correct the network."
            raise UserError(f"{name} returns {output} for a {task}; {expected}")


def blank_image(size: int) -> Tensor:
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)
