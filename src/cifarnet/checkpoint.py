"""From a checkpoint back to a network."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from cifarnet import __version__
from cifarnet.errors import UserError
from cifarnet.models import CNN, SpeedNet

NETWORKS = (CNN, SpeedNet)  # what a checkpoint may ask to be built


def class_path(cls: type) -> str:
    """The name by which a checkpoint refers to a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find(path: str | Path) -> Path:
    """A run's folder stands for its best checkpoint, or the last one where nothing was validated; a file for itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    best, last = path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"
    return last if last.is_file() and not best.is_file() else best


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; a file that holds anything but plain data is refused.

    Raises:
        UserError: there is no such file, it is not a checkpoint of this project, or one of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no checkpoint {path}. A run keeps its own in <run>/checkpoints/, best.ckpt and last.ckpt."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        recipe = checkpoint["hyper_parameters"]
        checkpoint["state_dict"].items(), checkpoint["epoch"], recipe["model"].items(), recipe["class_names"]
        recipe["config"]["data"].items(), recipe["config"]["module"].items(), recipe["config"]["trainer"]["precision"]
        written_by = Version(recipe["cifarnet"])
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of cifarnet, or is damaged: it holds other things than plain data. Such "
            "could run code: nothing of it was loaded."
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or "nothing in it"
        raise UserError(
            f"{path} is not a checkpoint of cifarnet, or is damaged ({type(error).__name__}: {reason})."
        ) from error
    if written_by > Version(__version__):
        raise UserError(
            f"{path} was written by cifarnet {written_by}, newer than the {__version__} installed here: update it."
        )
    return checkpoint


def listed(asked: Mapping[str, Any], classes: Iterable[type], path: str | Path) -> type:
    """The class that a part of a checkpoint asks for.

    Raises:
        UserError: it is none of `classes`. A checkpoint from a stranger can run no code.
    """
    known: dict[Any, type] = {class_path(cls): cls for cls in classes}
    # packages of this project offer their modules' classes: cifarnet.data.CIFAR10
    names = known | {f"{cls.__module__.rpartition('.')[0]}.{cls.__qualname__}": cls for cls in known.values()}
    name = asked.get("_target_")
    if not isinstance(name, str) or name not in names:
        raise UserError(
            f"{path} asks for the class {name}, which is not one of {', '.join(sorted(known))}. If it is your own, "
            "allow it: cifarnet.load(path, classes=[YourNetwork]), or cifarnet.evaluate … classes=[module.YourClass]."
        )
    return names[name]


def build(checkpoint: Mapping[str, Any], path: str | Path, classes: Iterable[type] = ()) -> tuple[nn.Module, list[str]]:
    """The trained network of what `read` returned, and the names of its classes, as `load` does.

    `path` is for messages.
    """
    recipe = checkpoint["hyper_parameters"]
    cls = listed(recipe["model"], (*NETWORKS, *classes), path)
    prefix = "network."
    state = {key[len(prefix) :]: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    try:
        network = cls(**{key: value for key, value in recipe["model"].items() if key != "_target_"})
        network.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or its network has changed since: {reason[:300]}") from error
    return network.eval(), [str(name) for name in recipe["class_names"]]


def load(path: str | Path, classes: Iterable[type[nn.Module]] = ()) -> tuple[nn.Module, list[str]]:
    """The trained network of a checkpoint, in eval mode on the CPU, and the names of its classes.

        network, class_names = cifarnet.load("lightning_logs/baseline/<date_time>")
        network(images).argmax(1)  # images: uint8 or float in [0, 1], [B, 3, 32, 32]

    Args:
        path: a checkpoint file, or a run's folder (then its best checkpoint, or the last one where nothing
            was validated).
        classes: network classes of your own that the checkpoint may ask for. Others are refused: a checkpoint
            from a stranger can run no code.

    Raises:
        UserError: no such file, not a checkpoint, or a class that is not listed.
    """
    path = find(path)
    return build(read(path), path, classes)
