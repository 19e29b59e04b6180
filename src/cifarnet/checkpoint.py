"""From a checkpoint back to a network."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifarnet.errors import UserError
from cifarnet.models import CNN, SpeedNet

NETWORKS = (CNN, SpeedNet)  # what a checkpoint may ask to be built


def class_path(cls: type) -> str:
    """The name by which a checkpoint refers to a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; a file that holds anything but plain data is refused.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no checkpoint {path}. A run keeps its own in <run>/checkpoints/, best.ckpt and last.ckpt."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["hyper_parameters"]["model"]
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is not a checkpoint of cifarnet, or is damaged ({type(error).__name__}: {reason})."
        ) from error
    return checkpoint


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
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints"
        path = folder / "best.ckpt"
        if not path.is_file() and (folder / "last.ckpt").is_file():  # trained on all images
            path = folder / "last.ckpt"
    checkpoint = read(path)
    recipe = checkpoint["hyper_parameters"]
    arguments = dict(recipe["model"])
    name = arguments.pop("_target_")
    known = {class_path(cls): cls for cls in (*NETWORKS, *classes)}
    if name not in known:
        raise UserError(
            f"{path} asks for the network class {name}, which is not one of {', '.join(sorted(known))}. "
            "If it is yours, pass it: cifarnet.load(path, classes=[YourNetwork])."
        )
    network = known[name](**arguments)
    prefix = "network."
    state = {key[len(prefix) :]: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    network.load_state_dict(state)
    return network.eval(), list(recipe["class_names"])
