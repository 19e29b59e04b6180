"""Fine-tuning: training that begins with the weights of a network that was trained on other classes or images."""

import hashlib
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from cifarnet import checkpoint
from cifarnet.allowlist import locate
from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.recipes.backbone import head_of


def expanded(config: DictConfig) -> DictConfig:
    """A copy of the config of `model=trained model.checkpoint=RUN`, in which `model` says how that run's network is
    made, but for what is set beside, and `start` which file its weights are from; any other config as it is.

    Raises:
        UserError: no such checkpoint, or one that asks for a class that it may not.
    """
    model = config.get("model")
    if not isinstance(model, DictConfig) or "_target_" in model:
        return config
    if OmegaConf.is_missing(model, "checkpoint"):
        raise UserError("model.checkpoint is missing: say with which run to begin, model.checkpoint=<its folder>.")
    if "checkpoint" not in model:
        return config
    path = checkpoint.find(os.path.expanduser(str(model.checkpoint)))
    content = checkpoint.read(path)
    recorded = dict(content["resolved"]["model"])
    if "checkpoint" in recorded:  # timm's: its weights come from this one now
        recorded["checkpoint"] = None
    made = checkpoint.checked({"model": recorded}, path, locate(config.classes))["model"]
    written: Any = OmegaConf.to_container(config, resolve=False)
    own = {key: value for key, value in written["model"].items() if key != "checkpoint"}
    weights = path / checkpoint.SHARED[0] if path.is_dir() else path
    start = {"checkpoint": str(path.resolve()), "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    return OmegaConf.create(written | {"model": made | own, "start": start})


def take_over(network: nn.Module, config: DictConfig, data: ImageDataModule) -> None:
    """Give a network the weights, and the statistics of images, of the checkpoint in `config.start`. Where that knew
    other classes, the head stays as it is, untrained.

    Raises:
        UserError: it was trained on images of another size, or its weights do not fit.
    """
    path = Path(config.start.checkpoint)
    content = checkpoint.read(path)
    hparams, given = content["hyper_parameters"], checkpoint.weights(content)
    checkpoint.check_same_size(hparams, data.image_size, str(path))
    own = network.state_dict()
    new = {f"{head_of(network)}.{key}" for key in network.get_submodule(head_of(network)).state_dict()}
    if list(hparams["class_names"]) == list(data.class_names):
        new = set()
    misfits = [key for key in own if key not in new and getattr(given.get(key), "shape", None) != own[key].shape]
    if misfits:
        raise UserError(f"{path} does not fit this network: {', '.join(misfits[:3])} differ, of {len(misfits)}.")
    network.load_state_dict({key: own[key] if key in new else given[key] for key in own})
