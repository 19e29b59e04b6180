"""Build the trainer, the classifier and the data that a config describes. Only this module instantiates classes."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifarnet import __version__, finetuning
from cifarnet.checkpoint import Checkpoint
from cifarnet.classifier import Classifier
from cifarnet.data import ImageDataModule
from cifarnet.data.shared_images import SharedImages
from cifarnet.errors import UserError
from cifarnet.models import Normalize, construct, try_on
from cifarnet.system import distributed, hardware
from cifarnet.system.checkpoint_io import CheckpointIO

Part = TypeVar("Part")
STATE = "cifarnet.callbacks.training_state.TrainingState"
COMPILE = "cifarnet.callbacks.compilation.Compile"
FREEZE = "cifarnet.recipes.freeze.Freeze"


class Built(NamedTuple):
    trainer: L.Trainer
    classifier: Classifier
    data: ImageDataModule
    fit_seconds: float  # spent in the network's own `fit`


def build(
    config: DictConfig,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    images: SharedImages | None = None,
    **trainer_settings: Any,
) -> Built:
    """Build everything that a run consists of.

    Args:
        config: a valid config, as composed from `configs/train.yaml`.
        callbacks: callbacks in addition to those of the config.
        checkpoint: the checkpoint of this run from which training will be resumed.
        images: images that the previous run has read.
        trainer_settings: settings of Lightning's Trainer that replace those of the config.

    Raises:
        UserError: a setting or the data cannot be used; the message says what to do.
    """
    L.seed_everything(config.seed, verbose=False)
    data = make_data(config)
    if images is not None:
        images.share(config.data, data)
    trainer = make_trainer(config, callbacks, data.validates, checkpoint, **trainer_settings)
    network, fit_seconds = make_network(config, data, resumes=checkpoint is not None)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    classifier = instantiate(config.module, _partial_=True)(
        network=network,
        optimizer=_optimizer(config),
        scheduler=_scheduler(config) if config.get("scheduler") else None,
        objective=make_objective(config, len(data.class_names)),
        channels_last=config.channels_last,
        seed=config.seed,
        hparams={
            "cifarnet": __version__,
            "class_names": list(data.class_names),
            "image_size": data.image_size,
            "num_images": len(data.source.train),
            "model": resolved["model"],
            "data": resolved["data"],
            "tta": resolved["module"].get("tta", "none"),
            "tta_share": resolved["module"].get("tta_share", 1.0),
            "precision": str(trainer.precision),
            "channels_last": config.channels_last,
            "config": OmegaConf.to_container(config, resolve=False),  # for resuming
        },
    )
    if (teacher := getattr(classifier, "teacher", None)) is not None:
        teacher.network = finetuning.load_teacher(teacher.checkpoint, data, config.classes)
    return Built(trainer, classifier, data, fit_seconds)


def make_data(config: DictConfig) -> ImageDataModule:
    """Build the data module of a config's section `data`; it reads the images on first use."""
    return _expect(ImageDataModule, "data", instantiate(config.data))


def make_network(config: DictConfig, data: ImageDataModule, resumes: bool = False) -> tuple[nn.Module, float]:
    """Build the network, and return it with the seconds that its own `fit` took.

    Its input is normalised by the statistics of the training images; a network that starts from the weights of another
    run (`config.start`) keeps the statistics of that run. With `resumes`, a checkpoint provides all of this.
    """
    make = instantiate(config.model, _partial_=True)
    with _explained("model"):
        network = construct(make, num_classes=len(data.class_names), image_size=data.image_size)
    try_on(network, {data.image_size, *(data.train_sizes or [])}, len(data.class_names))
    if resumes:
        return network, 0.0
    if config.get("start"):
        finetuning.transfer_weights(network, config, data)
        return network, 0.0
    for layer in network.modules():
        if isinstance(layer, Normalize):
            layer.fit(*data.channel_statistics)
    start = time.perf_counter()
    if callable(fit := getattr(network, "fit", None)):
        fit(data.sample())
    return network, time.perf_counter() - start


def make_objective(config: DictConfig, num_classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the objective, and try it on two images: torch's losses check their settings when they are called."""
    objective = instantiate(config.objective)
    with _explained("objective"):
        losses = objective(torch.zeros(2, num_classes), torch.arange(2) % num_classes)
    if getattr(losses, "shape", None) != (2,) or not losses.isfinite().all():
        raise UserError(
            f"objective returns {losses} for two images: expected two losses. Set objective.reduction=none."
        )
    return objective


def make_trainer(
    config: DictConfig,
    callbacks: Sequence[Callback] = (),
    validates: bool = True,
    checkpoint: Checkpoint | None = None,
    **trainer_settings: Any,
) -> L.Trainer:
    """Build Lightning's Trainer with callbacks and loggers; `validates`: whether there are validation images."""
    all_callbacks = [*_callbacks(config, validates), *callbacks]
    bars = [callback for callback in all_callbacks if isinstance(callback, ProgressBar)]
    shows_bar = config.trainer.get("enable_progress_bar") is not False
    for bar in bars if not shows_bar else []:
        bar.disable()  # it still prints a line after every epoch
    defaults = {
        "default_root_dir": config.output_dir,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10**6,  # callbacks.history.History logs the metrics once per epoch
        "use_distributed_sampler": False,  # the loader divides batches among the ranks
    }
    settings = {key: value for key, value in defaults.items() if key not in config.trainer}
    if config.trainer.precision == "auto":
        settings["precision"] = hardware.best_precision(config.trainer.accelerator)
    settings |= distributed.trainer_settings(config.trainer)
    freezes = any(recipe and recipe._target_ == FREEZE for recipe in (config.get("recipe") or {}).values())
    if freezes and settings.get("strategy", config.trainer.strategy) == "ddp":
        settings["strategy"] = "ddp_find_unused_parameters_true"  # frozen weights get no gradient
    settings |= {
        "callbacks": all_callbacks,
        "plugins": [
            CheckpointIO(checkpoint.content if checkpoint else None),
            distributed.environment(),
            *instantiate(config.trainer.get("plugins") or []),
        ],
        "logger": _loggers(config),
        "enable_progress_bar": shows_bar or bool(bars),
    }
    try:
        trainer = instantiate(config.trainer, _partial_=True)(**(settings | trainer_settings))
    except InstantiationException:
        raise
    except Exception as error:  # Lightning raises many types for settings that it cannot use
        chosen = " ".join(f"trainer.{key}={config.trainer.get(key)}" for key in ("accelerator", "devices", "strategy"))
        raise UserError(f"{chosen} cannot be used: {error} Choose trainer=auto, cpu or ddp.") from error
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true requires GPUs. Remove it.")
    return trainer


def _callbacks(config: DictConfig, validates: bool) -> list[Callback]:
    """Build the callbacks of a config, recipes first: those that save a checkpoint then save what a recipe changed."""
    sections = [*(config.get("recipe") or {}).values(), *(config.get("callbacks") or {}).values()]
    chosen = [section for section in sections if section]
    if not validates:  # there is no metric by which to choose a checkpoint
        chosen = [section for section in chosen if not str(section.get("monitor")).startswith("val/")]
    callbacks = [_expect(Callback, section._target_, instantiate(section)) for section in chosen]
    averages = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
    if len(averages) > 1:
        raise UserError(f"{' and '.join(averages)} both replace the network's weights by an average: choose one.")
    first = [instantiate({"_target_": STATE})]
    if config.compile:
        first.append(instantiate({"_target_": COMPILE, "mode": config.compile}))
    return first + callbacks


def _loggers(config: DictConfig) -> list[Logger]:
    section = config.get("logger") or {}
    chosen = [section] if "_target_" in section else [logger for logger in section.values() if logger]
    return [instantiate(logger) for logger in chosen]


def _optimizer(config: DictConfig) -> Callable[[Iterable[Tensor]], Optimizer]:
    def make(parameters: Iterable[Tensor]) -> Optimizer:
        with _explained("optimizer"):
            make_optimizer = instantiate(config.optimizer, _partial_=True, _convert_="all")  # plain lists can be saved
            return _expect(Optimizer, "optimizer", make_optimizer(parameters))

    return make


def _scheduler(config: DictConfig) -> Callable[[Optimizer, int], LRScheduler]:
    def make(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        if total_steps < 1 and "${total_steps}" in str(OmegaConf.to_container(config.scheduler)):
            raise UserError("scheduler needs the number of steps: set trainer.max_epochs=20, or scheduler=constant.")
        with _explained(f"scheduler, planned for {total_steps} steps"):
            section = with_total_steps(config, total_steps).scheduler
            make_schedule = instantiate(section, _partial_=True, _convert_="all")
            return _expect(LRScheduler, "scheduler", make_schedule(optimizer))

    return make


def with_total_steps(config: DictConfig, total_steps: float) -> Any:
    """Return a copy of the config with the number of steps that schedules refer to as `${total_steps}`."""
    return OmegaConf.merge(config, {"total_steps": total_steps})


def _expect(kind: type[Part], name: str, built: Any) -> Part:
    if not isinstance(built, kind):
        raise UserError(f"{name} builds a {type(built).__name__}, and a {kind.__name__} is needed. See --help.")
    return built


@contextlib.contextmanager
def _explained(part: str) -> Iterator[None]:
    """Report the errors by which networks, optimizers, schedules and losses reject their settings."""
    try:
        yield
    except ArithmeticError as error:  # a warm-up of one step or none
        raise UserError(f"{part}: {error}. Train for longer, or choose scheduler=linear or constant.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{part}: {' '.join(str(error).split())}") from error
