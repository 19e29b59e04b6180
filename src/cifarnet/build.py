"""From a config to what it names: the trainer, the classifier, the data. Nothing else instantiates."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifarnet import __version__, checkpoint, finetuning
from cifarnet.classifier import Classifier
from cifarnet.config import Range, check_range, validate
from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.models import Normalize, construct, try_on
from cifarnet.recipes.freeze import Freeze
from cifarnet.system import distributed, hardware
from cifarnet.system.checkpoint_io import WholeCheckpoints
from cifarnet.system.log_output import quiet_libraries, without_tensorflow

Part = TypeVar("Part")


class Built(NamedTuple):
    trainer: L.Trainer
    classifier: Classifier
    data: ImageDataModule
    fit_seconds: float  # what the network's own `fit` to training images took


def build(
    config: DictConfig,
    callbacks: Sequence[Callback] = (),
    fresh: bool = True,
    read: Callable[[ImageDataModule], None] | None = None,
    **trainer_settings: Any,
) -> Built:
    """All that a run is made of. The config is only read.

    Args:
        config: as composed from `configs/train.yaml`; outside `python -m cifarnet.train`, set `output_dir`.
        callbacks: more of them than the config has.
        fresh: whether the network begins with the weights of `config.start`; not where a checkpoint brings its own.
        read: gives the images to those who need not read them themselves.
        trainer_settings: of Lightning's Trainer, in place of the config's.

    Raises:
        UserError: a setting or the data cannot be used; the message says what to do.
    """
    quiet_libraries()
    validate(config)
    if config.keep_freed_memory:
        hardware.keep_freed_memory()
    if (threads := config.threads or (hardware.slurm_cores() and hardware.cores())) is not None:
        torch.set_num_threads(threads)
    L.seed_everything(config.seed, verbose=False)

    data = make_data(config)
    if read is not None:
        read(data)
    trainer = make_trainer(config, callbacks, data.validates, **trainer_settings)
    if config.threads is None and trainer.num_devices > 1:
        sharing = trainer.num_devices // hardware.slurm_tasks()  # srun gives each rank cores of its own
        torch.set_num_threads(max(1, hardware.cores() // max(1, sharing)))
    network, fit_seconds = make_network(config, data, fresh)
    classifier = instantiate(config.module, _partial_=True)(
        network=network,
        optimizer=_optimizer(config),
        scheduler=_scheduler(config) if config.get("scheduler") else None,
        objective=_objective(config, len(data.class_names)),
        channels_last=config.channels_last,
        seed=config.seed,
        hparams={
            "cifarnet": __version__,
            "class_names": list(data.class_names),
            "image_size": data.image_size,
            "images": len(data.source.train),
            "precision": str(trainer.precision),
            "config": OmegaConf.to_container(config, resolve=False),
        },
    )
    if (teacher := getattr(classifier, "teacher", None)) is not None:  # read here: whoever loads the student needs none
        teacher.network = checkpoint.load_for(data, teacher.checkpoint, config.classes)
    return Built(trainer, classifier, data, fit_seconds)


def make_data(config: DictConfig) -> ImageDataModule:
    """The images that a config's section `data` names, which are read on first use."""
    return _expect(ImageDataModule, "data", instantiate(config.data))


def make_network(config: DictConfig, data: ImageDataModule, fresh: bool = True) -> tuple[nn.Module, float]:
    """The network, normalising by the training images' statistics (or those of the images with which it was trained, if
    it begins with the weights of `config.start`), and the seconds that its own `fit` took."""
    make = instantiate(config.model, _partial_=True)
    with _refusals("model"):
        network = construct(make, num_classes=len(data.class_names), image_size=data.image_size)
    try_on(network, {data.image_size, *(data.train_sizes or [])}, len(data.class_names))
    if config.get("start") and fresh:
        finetuning.take_over(network, config, data)
        return network, 0.0
    for layer in network.modules():
        if isinstance(layer, Normalize):
            layer.fit(*data.channel_statistics)
    start = time.perf_counter()
    if hasattr(network, "fit"):
        network.fit(data.sample())
    return network, time.perf_counter() - start


def _objective(config: DictConfig, classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits and labels -> each image's loss, of two images for a try."""
    objective = instantiate(config.objective)
    smoothing = getattr(objective, "label_smoothing", 0)  # torch takes a negative one for none
    check_range("objective.label_smoothing", smoothing, Annotated[float, Range(0, 1)])
    try:
        losses = objective(torch.zeros(2, classes), torch.arange(2) % classes)
    except Exception as error:  # torch's objectives check their settings when they are called
        raise UserError(f"objective: {' '.join(str(error).split())}") from error
    if getattr(losses, "shape", None) != (2,) or not losses.isfinite().all():
        raise UserError(
            f"objective: of two images it makes {losses}; expected two losses (of torch's: objective.reduction=none)."
        )
    return objective


def make_trainer(
    config: DictConfig, callbacks: Sequence[Callback] = (), validates: bool = True, **trainer_settings: Any
) -> L.Trainer:
    """Lightning's Trainer with callbacks and logger; `validates` says whether there are validation images."""
    chosen = [callback for callback in (config.get("callbacks") or {}).values() if callback]
    if not validates:  # nothing to choose a checkpoint by
        chosen = [callback for callback in chosen if not str(callback.get("monitor")).startswith("val/")]
    # recipes first: what saves in the middle of an epoch then saves weights that they are done with
    chosen = [recipe for recipe in (config.get("recipe") or {}).values() if recipe] + chosen
    built = [*(_expect(Callback, callback._target_, instantiate(callback)) for callback in chosen), *callbacks]
    if len(averages := [type(one).__name__ for one in built if isinstance(one, WeightAveraging)]) > 1:
        raise UserError(f"{' and '.join(averages)} each put averaged weights in place of the network's: choose one.")
    if config.compile:
        compilation = {"_target_": "cifarnet.callbacks.compilation.Compile", "mode": config.compile}
        built.insert(0, instantiate(compilation))  # before the clocks of others start
    bars = [callback for callback in built if isinstance(callback, ProgressBar)]
    shown = config.trainer.get("enable_progress_bar") is not False
    for bar in [] if shown else bars:
        bar.disable()  # its line an epoch stays
    accelerator, precision = config.trainer.accelerator, config.trainer.precision
    quiet = {"default_root_dir": config.output_dir, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"log_every_n_steps": 10**6}  # metrics are logged once an epoch, by callbacks.history.History
    quiet |= {"use_distributed_sampler": False}  # the loader takes each rank's share
    given = {
        **{key: value for key, value in quiet.items() if key not in config.trainer},
        "precision": hardware.best_precision(accelerator) if precision == "auto" else precision,
        "callbacks": built,
        "plugins": [WholeCheckpoints(), distributed.environment(), *instantiate(config.trainer.get("plugins") or [])],
        "logger": _loggers(config),
        "enable_progress_bar": shown or bool(bars),
        **distributed.trainer_settings(config.trainer),
    }
    try:
        trainer: L.Trainer = instantiate(config.trainer, _partial_=True)(**(given | trainer_settings))
    except InstantiationException:
        raise
    except Exception as error:  # Lightning raises many types for settings it cannot use
        if "strategy" in str(error):
            strategy = config.trainer.get("strategy")
            raise UserError(f"trainer.strategy={strategy} is not supported. Choose trainer=ddp. ({error})") from error
        if "can not run on your system" in str(error) or "backend found" in str(error):
            raise UserError(
                f"trainer.accelerator={accelerator}: PyTorch finds no such device on this machine. "
                f"Choose trainer=auto or trainer=cpu, or install a PyTorch that supports it. ({error})"
            ) from error
        raise UserError(f"trainer: {error}") from error
    if getattr(trainer.strategy, "_start_method", "popen") != "popen" or not isinstance(
        trainer.strategy, SingleDeviceStrategy | DDPStrategy
    ):
        raise UserError(f"trainer.strategy={config.trainer.strategy} is not supported. Choose trainer=ddp.")
    if any(isinstance(callback, Freeze) for callback in built) and isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # else ranks wait for frozen weights' gradients
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true needs GPUs. Leave it out: each rank normalises its own share.")
    return trainer


def _loggers(config: DictConfig) -> list[Logger]:
    """Those named in the section `logger`, or the one that it is."""
    without_tensorflow()
    section = config.get("logger") or {}
    chosen = [section] if "_target_" in section else [logger for logger in section.values() if logger]
    return [instantiate(logger) for logger in chosen]


def _optimizer(config: DictConfig) -> Callable[[Iterable[Tensor]], Optimizer]:
    def make(parameters: Iterable[Tensor]) -> Optimizer:
        with _refusals("optimizer"):
            make_optimizer = instantiate(config.optimizer, _partial_=True, _convert_="all")  # with plain lists, to save
            return _expect(Optimizer, "optimizer", make_optimizer(parameters))

    return make


def _scheduler(config: DictConfig) -> Callable[[Optimizer, int], LRScheduler]:
    def make(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        if total_steps < 1 and "${total_steps}" in str(OmegaConf.to_container(config.scheduler)):
            raise UserError("This schedule needs an end: give trainer.max_epochs=20, for one, or scheduler=constant.")
        with _refusals(f"scheduler of {total_steps} steps"):
            make_schedule = instantiate(planned(config, total_steps).scheduler, _partial_=True, _convert_="all")
            return _expect(LRScheduler, "scheduler", make_schedule(optimizer))

    return make


def planned(config: DictConfig, total_steps: float) -> DictConfig:
    """A copy of the config that knows the number of steps, for which schedules ask as `${total_steps}`."""
    return OmegaConf.merge(config, {"total_steps": total_steps})


def _expect(kind: type[Part], name: str, made: Any) -> Part:
    """What was built, if it is what its place in the config is for."""
    if not isinstance(made, kind):
        raise UserError(
            f"{name} makes a {type(made).__name__}: here a {kind.__name__} is needed. See the choices: --help"
        )
    return made


@contextlib.contextmanager
def _refusals(part: str) -> Iterator[None]:
    """Networks, torch's optimizers and schedules refuse settings by errors of several types."""
    try:
        yield
    except ArithmeticError as error:  # a warm-up of one step or none
        raise UserError(f"{part}: {error}. Train for longer, or choose scheduler=linear or constant.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{part}: {' '.join(str(error).split())}") from error
