"""Networks of timm and torchvision with a stem for small images."""

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from cifarnet.errors import UserError, reason
from cifarnet.models.normalize import Normalize
from cifarnet.schema import Range, did_you_mean

Weights = dict[str, Tensor]
Rate = Annotated[float, Range(0, below=1)] | None


class LibraryModel(nn.Module):
    """A network of timm or torchvision, selected by name. Nothing is downloaded.

    The stem is adapted to small images: if the first convolution has a stride and a larger kernel, it gets stride 1 and
    a kernel of at most 3×3, and the max pool after it is removed. Patch embeddings are not changed (most of timm's take
    a `patch_size`), nor is the stem of a network that is built for one image size. The library initializes the weights.

    Shapes: images [B, 3, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].

    Args:
        library: "timm" or "torchvision".
        name: one of `timm.list_models()` or `torchvision.models.list_models()`.
        image_size: the height and width in pixels, for networks that take an image size.
        small_stem: false keeps the library's stem.
        checkpoint: a file of pretrained weights (.pth, .safetensors) with which training begins; the head is new. `fit`
            reads it, so it is not needed to load a trained network.
        drop_rate, drop_path_rate: the rates of timm's networks; None uses the library's default.
        settings: other arguments of the network's constructor.

    Raises:
        UserError: the library is not installed, has no such network, or does not accept a setting.
    """

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
                raise UserError(f"model.{key} is not supported: read pretrained weights from model.checkpoint=FILE.")
        settings |= {"num_classes": num_classes, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self.library, self.name, self.image_size = library, name, image_size
        self.small_stem, self.checkpoint = small_stem, checkpoint
        self.normalize = Normalize()
        self.network = self.build()

    def fit(self, images: Tensor) -> None:
        """Load the pretrained weights, if `checkpoint` is set; the images are not used."""
        if self.checkpoint is not None:
            self.network.load_state_dict(self.build(read_weights(self.checkpoint)).state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))

    def build(self, weights: Weights | None = None) -> nn.Module:
        """Return the library's network, with random or pretrained weights and a new head."""
        try:
            network, fixed_size = self._timm(weights) if self.library == "timm" else self._torchvision(weights)
        except ImportError as error:
            remedy = f"pip install 'cifarnet[{self.library}]'"
            raise UserError(f"model={self.library} needs {self.library}: {remedy}") from error
        except NotImplementedError:  # some networks cannot be built on the meta device
            raise
        except Exception as error:  # constructors and state dicts raise many types
            problem = f"{self.library} cannot build this network ({type(error).__name__}: {reason(error)[:300]})"
            raise UserError(f"model.name={self.name}: {problem}. Change its settings.") from error
        if self.small_stem and not fixed_size:
            _shrink_stem(network)
        return network

    def _timm(self, weights: Weights | None) -> tuple[Any, bool]:
        """Return the network, and whether it is built for one image size."""
        import timm

        if not timm.is_model(self.name.partition(".")[0]):  # such as a repository, which timm would download
            raise ValueError(f"it has no such network.{did_you_mean(self.name, timm.list_models())}")
        create, size, settings = partial(timm.create_model, self.name), {"img_size": self.image_size}, self.settings
        if weights is None:
            network = _with_size(create, size, settings)
        else:  # with the classes of the weights, so that all weights must fit
            others = {key: value for key, value in settings.items() if key != "num_classes"}
            others |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
            network = _with_size(create, size, others)
            network.reset_classifier(settings["num_classes"])
        return network, bool(network.pretrained_cfg.get("fixed_input_size"))

    def _torchvision(self, weights: Weights | None) -> tuple[Any, bool]:
        """Return the network, and whether it is built for one image size."""
        names = models.list_models(module=models)
        if self.name not in names:
            raise ValueError(f"it has no such network.{did_you_mean(self.name, names)}")
        settings = self.settings
        if self.name in ("googlenet", "inception_v3"):  # by default they return two more outputs in training
            settings = {"aux_logits": False, "init_weights": True} | settings
        create = partial(models.get_model, self.name, weights=None)
        network = _with_size(create, {"image_size": self.image_size}, settings)
        if weights is not None:
            for key, value in network.state_dict().items():
                is_counter = key.endswith("num_batches_tracked")  # absent from old files
                if not is_counter and weights[key].shape == value.shape:  # the head for other classes is skipped
                    value.copy_(weights[key])
        return network, hasattr(network, "image_size")


def _with_size(create: Callable[..., nn.Module], size: dict[str, int], settings: dict[str, Any]) -> Any:
    """Create a network; pass the image size if the network takes one."""
    try:
        return create(**(size | settings))
    except TypeError:  # it takes no size; if another setting is wrong, the same error is raised again
        return create(**settings)


def read_weights(path: str) -> Weights:
    """Read a state dict, or a checkpoint that contains one, without running code in the file."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights.get("model", weights))
        if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it contains no state dict")
    except Exception as error:  # torch and safetensors raise many types
        problem = f"cannot be read as pretrained weights: {reason(error)[:300]}"
        raise UserError(f"model.checkpoint={path} {problem}. Use another file.") from error
    return weights


def _shrink_stem(network: nn.Module) -> None:
    """Set the first convolutions to stride 1 and kernels of at most 3×3, and remove the max pool after them."""
    layers = [(key, layer) for key, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    stem = [layer for _, layer in layers if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]  # all of them
    if not any(conv.kernel_size[0] > conv.stride[0] > 1 for conv in stem):  # already small, or a patch embedding
        return
    for conv in stem:
        conv.stride = (1, 1)
        if (size := conv.kernel_size[0]) > 3:
            edge = (size - 3) // 2
            middle = conv.weight.detach()[:, :, edge : edge + 3, edge : edge + 3].clone()
            conv.weight = nn.Parameter(middle * (size / 3))  # the scale of an initial 3×3 kernel
            conv.kernel_size, conv.padding = (3, 3), (1, 1)
    for key, layer in layers[:4]:  # the pool follows one convolution, or the three of a deep stem
        if isinstance(layer, nn.MaxPool2d) and layer.stride != 1:
            network.set_submodule(key, nn.Identity())
            return
