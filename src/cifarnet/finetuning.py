"""Fine-tuning, which starts from the weights of another run, and distillation, which learns from its network."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from cifarnet.allowlist import class_path, locate
from cifarnet.checkpoint import Checkpoint
from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.models import check_output
from cifarnet.recipes.backbone import head_name

# settings of `data` that determine the validation images
DIVISION = ("val_fraction", "split_seed", "folds", "fold", "train_size")


def expand(config: DictConfig) -> DictConfig:
    """Record the checkpoint that a run starts from in `start`, with its checksum. Replace `model=trained
    model.checkpoint=RUN` with the network's class and arguments in that checkpoint.

    Other arguments of `model` replace the recorded ones. A config without a checkpoint, or with a recorded one, is
    returned unchanged.

    Raises:
        UserError: the checkpoint does not exist, or names a class that is not allowed.
    """
    model, start = config.get("model"), config.get("start")
    if start is not None and not isinstance(start, DictConfig):
        return config  # `validate` reports it
    start = start or {}
    # `in` does not find a key whose value is missing
    is_trained = isinstance(model, DictConfig) and "_target_" not in model and "checkpoint" in list(model)
    if is_trained and OmegaConf.is_missing(model, "checkpoint"):
        raise UserError("model.checkpoint is required: set it to a run's folder, model.checkpoint=RUN.")
    if is_trained and (path := start.get("checkpoint")):
        raise UserError(f"start.checkpoint={path} cannot be set with model=trained. Remove start.checkpoint.")
    source = model.checkpoint if is_trained else start.get("checkpoint")
    if source is None or "sha256" in start:
        return config
    checkpoint = Checkpoint.open(str(source), last=bool(start.get("optimizer")))
    expanded: Any = OmegaConf.to_container(config, resolve=False)
    if is_trained:
        make, arguments = checkpoint.architecture(locate(config.classes))
        changed = {key: value for key, value in expanded["model"].items() if key != "checkpoint"}
        expanded["model"] = {"_target_": class_path(make)} | arguments | changed
    path = str(checkpoint.path.resolve()).replace("${", r"\${")  # a path is not resolved
    settings = {key: value for key, value in start.items() if value}
    expanded["start"] = settings | {"checkpoint": path, "sha256": checkpoint.sha256()}
    completed: Any = OmegaConf.create(expanded)
    return completed


def transfer_weights(network: nn.Module, config: DictConfig, data: ImageDataModule) -> None:
    """Copy the weights and the statistics of the images from the checkpoint in `config.start` into a network.

    If the checkpoint was trained on other classes, the head keeps its initial weights. If it was validated on other
    images of the same data set, it may have been trained on validation images of this run, which is reported.

    Raises:
        UserError: the checkpoint was trained on images of another size, or its weights do not fit.
    """
    checkpoint = Checkpoint.open(config.start.checkpoint)
    checkpoint.check_image_size(data.image_size, str(checkpoint.path))
    weights, initial, head = checkpoint.weights, network.state_dict(), head_name(network)
    if not checkpoint.has_classes(data.class_names):
        if config.start.get("optimizer"):
            problem = f"{checkpoint.path} was trained on other classes, so that the head is new"
            raise UserError(f"start.optimizer=true: {problem}. Remove start.optimizer.")
        kept = {key: value for key, value in initial.items() if key.startswith(f"{head}.")}
        weights = {key: value for key, value in weights.items() if key not in kept} | kept
    elif checkpoint.data.get("_target_") == OmegaConf.select(config, "data._target_"):
        differing = [name for name in DIVISION if checkpoint.data.get(name) != config.data.get(name)]
        if differing:
            problem = "may have been trained on validation images of this run"
            print(f"{checkpoint.path} {problem}: data.{differing[0]} differs.", flush=True)
    checkpoint.check_weights(network, weights)
    network.load_state_dict(weights)


def make_optimizer(
    make: Callable[[Iterable[Tensor]], Optimizer], config: DictConfig, parameters: Iterable[Tensor]
) -> Optimizer:
    """Make an optimizer. With `start.optimizer`, copy its state, such as the momentum, from the checkpoint in
    `config.start`, but not its settings, such as the learning rate.

    Raises:
        UserError: the checkpoint has no state of such an optimizer.
    """
    optimizer = make(parameters)
    if not OmegaConf.select(config, "start.optimizer"):
        return optimizer
    checkpoint = Checkpoint.open(config.start.checkpoint)
    groups = optimizer.state_dict()["param_groups"]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    try:
        saved = checkpoint.content["optimizer_states"][0]
        target = checkpoint.content["hyper_parameters"]["config"]["optimizer"]["_target_"]
        sizes = [[len(group["params"]) for group in part] for part in (saved["param_groups"], groups)]
        states = [(weights[key].shape, state.values()) for key, state in saved["state"].items()]
        shapes = [(shape, value.shape) for shape, state in states for value in state if torch.is_tensor(value)]
        fits = all(torch.broadcast_shapes(*pair) == pair[0] for pair in shapes)  # Adafactor has means of rows
    except (LookupError, TypeError, AttributeError, RuntimeError):  # it was not saved by a run
        target, sizes, fits = None, [], False
    if target != config.optimizer._target_ or sizes[0] != sizes[1] or not fits:
        problem = f"{checkpoint.path} contains no state of {config.optimizer._target_} that fits this run"
        remedy = "Choose optimizer, module.no_decay and recipe.backbone as in that run, or remove start.optimizer"
        raise UserError(f"start.optimizer=true: {problem}. {remedy}.")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    return optimizer


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
