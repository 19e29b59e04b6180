"""Fine-tuning, which starts from the weights of another run, and distillation, which learns from its network."""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cifarnet.allowlist import class_path, locate
from cifarnet.checkpoint import Checkpoint
from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.models import check_output
from cifarnet.recipes.backbone import head_name


def expand(config: DictConfig) -> DictConfig:
    """Replace `model=trained model.checkpoint=RUN` with the network's class and arguments in that run's checkpoint.

    Other arguments of `model` replace the recorded ones. `start` records the checkpoint. Any other config is returned
    unchanged.

    Raises:
        UserError: the checkpoint does not exist, or names a class that is not allowed.
    """
    model = config.get("model")
    # `in` does not find a key whose value is missing
    if not isinstance(model, DictConfig) or "_target_" in model or "checkpoint" not in list(model):
        return config
    if OmegaConf.is_missing(model, "checkpoint"):
        raise UserError("model.checkpoint is required: set it to a run's folder, model.checkpoint=RUN.")
    if config.get("start"):
        raise UserError(f"start={config.start} is written by model=trained. Remove it.")
    checkpoint = Checkpoint.open(str(model.checkpoint))
    make, arguments = checkpoint.architecture(locate(config.classes))
    recorded = {"_target_": class_path(make)} | arguments
    written: Any = OmegaConf.to_container(config, resolve=False)
    changed = {key: value for key, value in written["model"].items() if key != "checkpoint"}
    path = str(checkpoint.path.resolve()).replace("${", r"\${")  # a path is not resolved
    start = {"checkpoint": path, "sha256": checkpoint.sha256()}
    expanded: Any = OmegaConf.create(written | {"model": recorded | changed, "start": start})
    return expanded


def transfer_weights(network: nn.Module, config: DictConfig, data: ImageDataModule) -> None:
    """Copy the weights and the statistics of the images from the checkpoint in `config.start` into a network.

    If the checkpoint was trained on other classes, the head keeps its initial weights.

    Raises:
        UserError: the checkpoint was trained on images of another size, or its weights do not fit.
    """
    checkpoint = Checkpoint.open(config.start.checkpoint)
    checkpoint.check_image_size(data.image_size, str(checkpoint.path))
    weights, initial, head = checkpoint.weights, network.state_dict(), head_name(network)
    if not checkpoint.has_classes(data.class_names):
        kept = {key: value for key, value in initial.items() if key.startswith(f"{head}.")}
        weights = {key: value for key, value in weights.items() if key not in kept} | kept
    checkpoint.check_weights(network, weights)
    network.load_state_dict(weights)


def load_teacher(path: str, data: ImageDataModule, classes: Sequence[str] = ()) -> nn.Module:
    """Load the trained network of a run for distillation.

    Args:
        path: a run's folder, a checkpoint file or the name of a trained network.
        data: the student's training images.
        classes: full names of allowed classes from outside this project.

    Raises:
        UserError: the checkpoint cannot be used, or has other classes or another image size than the data.
    """
    checkpoint = Checkpoint.open(path)
    name = f"the teacher {checkpoint.path}"
    checkpoint.check_task(data.class_names, data.image_size, name)
    network = checkpoint.network(locate(classes))
    check_output(network, data.train_sizes or [], len(checkpoint.class_names), name)
    return network.to(memory_format=torch.channels_last)  # the format of the batches
