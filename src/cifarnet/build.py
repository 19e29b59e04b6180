"""Build the trainer, the classifier and the data of a config. Only `build` and `trainer` call `instantiate`."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from cifarnet import __version__, cli, finetuning
from cifarnet.checkpoint import Checkpoint
from cifarnet.classifier import Classifier
from cifarnet.data import ImageDataModule
from cifarnet.data.shared_images import SharedImages
from cifarnet.errors import UserError, as_user_error
from cifarnet.models import Normalize, check_output, construct
from cifarnet.schema import tensor_arguments
from cifarnet.trainer import expect, make_scheduler, make_trainer, prepare


class Built(NamedTuple):
    trainer: L.Trainer
    classifier: Classifier
    data: ImageDataModule
    fit_seconds: float  # the duration of the network's `fit`


def build(
    config: DictConfig,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    images: SharedImages | None = None,
    **trainer_settings: Any,
) -> Built:
    """Build the trainer, the classifier and the data of a run.

    Args:
        config: a valid config, as composed from `configs/train.yaml`.
        callbacks: callbacks in addition to the callbacks of the config.
        checkpoint: the checkpoint of this run from which training will be resumed.
        images: the images that the previous run read.
        trainer_settings: settings of Lightning's Trainer that override the section `trainer` of the config.

    Raises:
        UserError: a setting or the data cannot be used.
    """
    L.seed_everything(config.seed, verbose=False)
    config = finetuning.expand(config)
    data = make_data(config)
    if images is not None:
        images.share(config.data, data)
    validates = config.trainer.get("limit_val_batches") != 0 and data.validates
    trainer = make_trainer(config, callbacks, validates, checkpoint, **trainer_settings)
    network, fit_seconds = make_network(config, data, resumes=checkpoint is not None)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    classifier = instantiate(config.module, _partial_=True)(
        network=network,
        optimizer=_optimizer(config) if checkpoint else partial(finetuning.make_optimizer, _optimizer(config), config),
        scheduler=make_scheduler(config, validates) if config.get("scheduler") else None,
        objective=make_objective(config, data, trainer.strategy.root_device),
        channels_last=config.channels_last,
        seed=config.seed,
        hparams={
            "cifarnet": __version__,
            "class_names": list(data.class_names),
            "image_size": data.image_size,
            "num_images": len(data.source.train),
            "files_sha256": data.source.selection.get("files_sha256"),
            "model": resolved["model"],
            "data": resolved["data"],
            "tta": resolved["module"].get("tta", "none"),
            "tta_share": resolved["module"].get("tta_share", 1.0),
            "precision": str(trainer.precision),
            "channels_last": config.channels_last,
            "config": cli.without_resolvers(config, "logger"),  # for resuming
        },
    )
    if (teacher := getattr(classifier, "teacher", None)) is not None:
        teacher.network = finetuning.load_teacher(teacher.checkpoint, data, config.classes)
    prepare(trainer, classifier, data)
    return Built(trainer, classifier, data, fit_seconds)


def make_data(config: DictConfig) -> ImageDataModule:
    """Build the data module of a config's section `data`; the module reads the images on first use."""
    return expect(ImageDataModule, "data", instantiate(config.data, _convert_="all"))


def make_network(config: DictConfig, data: ImageDataModule, resumes: bool = False) -> tuple[nn.Module, float]:
    """Build the network; return it, and the duration of its `fit` in seconds.

    The network normalizes its input with the statistics of the training images; a network that starts from the weights
    of another run (`config.start`) keeps the statistics of that run. With `resumes`, a checkpoint provides them.
    """
    make = instantiate(config.model, _partial_=True)
    with as_user_error("model"):
        network = construct(make, num_classes=len(data.class_names), image_size=data.image_size)
    check_output(network, {data.image_size, *(data.train_sizes or [])}, len(data.class_names))
    if resumes:
        return network, 0.0
    if OmegaConf.select(config, "start.checkpoint") is not None:
        finetuning.transfer_weights(network, config, data)
        return network, 0.0
    for layer in network.modules():
        if isinstance(layer, Normalize):
            layer.fit(*data.source.channel_statistics)
    start, fit = time.perf_counter(), getattr(network, "fit", None)
    if callable(fit):
        fit(data.sample())
    return network, time.perf_counter() - start if callable(fit) else 0.0


def make_objective(config: DictConfig, data: ImageDataModule, device: torch.device) -> Callable[..., Tensor]:
    """Build the objective, and call it on two images, because torch's losses check their settings when called.

    Lists of numbers become tensors if the objective takes tensors, such as `weight`; a function gets them on `device`.
    """
    settings: Any = OmegaConf.to_container(config.objective, resolve=True)
    if settings.get("weight") == "balanced":
        settings["weight"] = data.balanced_weights()
    names = tensor_arguments(get_object(settings["_target_"]))
    tensors = {
        name: torch.tensor(settings.pop(name), dtype=torch.float32)
        for name in names
        if isinstance(settings.get(name), list)
    }
    is_function = settings.pop("_partial_", False)
    make = instantiate(settings, _partial_=True)
    with as_user_error("objective"):
        objective = partial(make, **tensors) if is_function else make(**tensors)
        losses = objective(torch.zeros(2, len(data.class_names)), torch.arange(2) % len(data.class_names))
    if getattr(losses, "shape", None) != (2,) or not losses.isfinite().all():
        raise UserError(
            f"objective returned {losses} for two images; expected one finite loss per image. "
            "Set objective.reduction=none."
        )
    return partial(make, **{name: tensor.to(device) for name, tensor in tensors.items()}) if is_function else objective


def _optimizer(config: DictConfig) -> Callable[[Iterable[Tensor]], Optimizer]:
    def make(parameters: Iterable[Tensor]) -> Optimizer:
        with as_user_error("optimizer"):
            make_optimizer = instantiate(config.optimizer, _partial_=True, _convert_="all")  # plain lists can be saved
            return expect(Optimizer, "optimizer", make_optimizer(parameters))

    return make
