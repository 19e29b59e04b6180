"""Networks of timm and torchvision, with a stem for small images."""

import difflib
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from cifarnet.config import Range, checked
from cifarnet.errors import UserError
from cifarnet.models.normalize import Normalize

Weights = dict[str, Tensor]
Rate = Annotated[float, Range(0, below=1)] | None


class LibraryModel(nn.Module):
    """A network that timm or torchvision makes by a name. Nothing is ever fetched.

    A first convolution that has a stride and overlaps loses its stride and what is more than 3×3 of its kernel, and a
    max pool after it is left out. Patches stay as they are (for most of timm's, `patch_size` says how large they are),
    and so does the stem of what is built for one image size, which is told `image_size`. The weights start as the
    library has them.

    Shapes: images [B, 3, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].

    Args:
        library: "timm" or "torchvision".
        name: as `timm.list_models()` or `torchvision.models.list_models()` has it.
        small_stem: false leaves the stem as it is.
        checkpoint: a file of pretrained weights to begin training with (.pth, .safetensors); the head begins anew. It
            is read by `fit`, so never where a trained network is loaded.
        drop_rate, drop_path_rate: timm's.
        settings: what else the network's constructor takes.

    Raises:
        UserError: the library is not installed or has no such network, or refuses a setting.
    """

    @checked("model")
    def __init__(
        self,
        library: Literal["timm", "torchvision"],
        name: str,
        num_classes: int = 10,
        image_size: int = 32,
        small_stem: bool = True,
        checkpoint: str | None = None,
        drop_rate: Rate = None,
        drop_path_rate: Rate = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        for key in settings:
            if re.match("pretrained|weights|checkpoint|cache_dir|progress|features_only", key):
                raise UserError(f"model.{key}: nothing is fetched here. Weights are read from model.checkpoint=FILE.")
        settings |= {"num_classes": num_classes, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        settings = {key: value for key, value in settings.items() if value is not None}
        self.checkpoint = checkpoint
        self.make = partial(_made, library, name, image_size, small_stem, settings)
        self.normalize = Normalize()
        self.network = self.make()

    def fit(self, images: Tensor) -> None:
        """Take over the pretrained weights; the images are not needed."""
        if self.checkpoint is not None:
            self.network.load_state_dict(self.make(_weights(self.checkpoint)).state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))


def _made(
    library: str, name: str, image_size: int, small_stem: bool, settings: dict[str, Any], weights: Weights | None = None
) -> nn.Module:
    make = {"timm": _of_timm, "torchvision": _of_torchvision}.get(library)
    if make is None:
        raise UserError(f"model.library={library}: give timm or torchvision.")
    try:
        network, fixed = make(name, image_size, settings, weights)
    except UserError:
        raise
    except Exception as error:  # of the many types that constructors raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"model.name={name}: {library} cannot make it so ({reason[:300]}).") from error
    if small_stem and not fixed:
        _shrink_stem(network)
    return network


def _of_timm(name: str, image_size: int, settings: dict[str, Any], weights: Weights | None) -> tuple[nn.Module, bool]:
    """The network, and whether it is built for one image size."""
    try:
        import timm
    except ImportError as error:
        raise UserError("model=timm needs timm: pip install -e '.[timm]'") from error
    if not timm.is_model(_plain(name).partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    own = settings
    if weights is not None:  # whose classes the network has at first: then all of them have to fit
        own = {key: value for key, value in settings.items() if key != "num_classes"}
        own |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
    try:
        network = timm.create_model(name, **({"img_size": image_size} | own))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        network = timm.create_model(name, **own)
    if weights is not None:
        network.reset_classifier(settings["num_classes"])
    return network, bool(network.pretrained_cfg.get("fixed_input_size"))


def _of_torchvision(
    name: str, image_size: int, settings: dict[str, Any], weights: Weights | None
) -> tuple[nn.Module, bool]:
    """The network, and whether it is built for one image size."""
    from torchvision import models

    known = models.list_models(module=models)
    if _plain(name) not in known:
        raise _unknown("torchvision", name, known)
    if name in ("googlenet", "inception_v3"):  # which else give two answers more while they are trained
        settings = {"aux_logits": False, "init_weights": True} | settings
    make = models.get_model_builder(name)
    try:
        network = make(weights=None, **({"image_size": image_size} | settings))
    except TypeError as error:
        if "image_size" not in str(error):
            raise
        network = make(weights=None, **settings)
    if weights is not None:
        own = network.state_dict()
        if missing := [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]:
            raise ValueError(f"the file has no {missing[0]}")
        network.load_state_dict({key: weights[key] for key in own if _same_shape(key, own, weights)}, strict=False)
    return network, hasattr(network, "image_size")


def _same_shape(key: str, own: Weights, given: Weights) -> bool:
    """Not that of the head of other classes."""
    return key in given and given[key].shape == own[key].shape


def _plain(name: str) -> str:
    """A name that stands for no place from which something would be fetched or read."""
    if not re.fullmatch(r"[\w.]+", name):
        raise UserError(
            f"model.name={name}: networks are named, such as resnet18, and not fetched from anywhere. Weights are read "
            "from model.checkpoint=FILE."
        )
    return name


def _unknown(library: str, name: str, known: Collection[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3)
    meant = f"Did you mean {' or '.join(near)}?" if near else f"{library}.models.list_models() has all names."
    return UserError(f"model.name={name}: {library} has no such network. {meant}")


def _weights(path: str) -> Weights:
    """Pretrained weights by name, of a file that holds nothing but plain data."""
    if not Path(path).is_file():
        raise UserError(f"model.checkpoint={path}: there is no such file. Nothing is fetched: put it there first.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights.get("model", weights))
        if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("no weights in it")
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.checkpoint={path} holds no weights that can be read ({type(error).__name__}: {reason})."
        ) from error
    return weights


def _shrink_stem(network: nn.Module) -> None:
    """Stride 1 and at most 3×3 pixels for what convolves the image, and no max pool near it."""
    layers = [(key, layer) for key, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    stem = [layer for _, layer in layers if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]  # side by side
    if not any(conv.kernel_size[0] > conv.stride[0] > 1 for conv in stem):  # small already, or patches
        return
    for conv in stem:
        conv.stride = (1, 1)
        if (size := conv.kernel_size[0]) > 3:
            edge = (size - 3) // 2
            middle = conv.weight.detach()[:, :, edge : edge + 3, edge : edge + 3].clone()
            conv.weight = nn.Parameter(middle * (size / 3))  # the scale that a 3×3 kernel is initialised with
            conv.kernel_size, conv.padding = (3, 3), (1, 1)
    for key, layer in layers[:4]:  # after one convolution, or the three of a deep stem
        if isinstance(layer, nn.MaxPool2d) and layer.stride != 1:
            network.set_submodule(key, nn.Identity())
            return
