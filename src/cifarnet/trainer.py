"""Build Lightning's Trainer with the callbacks and loggers that a config describes, and the learning-rate schedule."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import callbacks as library
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cifarnet.checkpoint import Checkpoint
from cifarnet.config import output_folder, with_total_steps
from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError, as_user_error
from cifarnet.recipes.freeze import Freeze
from cifarnet.system import distributed, hardware
from cifarnet.system.checkpoint_io import CheckpointIO

Part = TypeVar("Part")
STATE = "cifarnet.callbacks.training_state.TrainingState"
DIVERGENCE = "cifarnet.callbacks.divergence.StopOnDivergence"
REFUSED = (  # characters that a logger would refuse after the start, or use to write elsewhere
    ("WandbLogger", "project", "/\\#?%:"),
    ("MLFlowLogger", "artifact_location", "?#"),
)
COMPILE = "cifarnet.callbacks.compilation.Compile"
TRAIN_METRICS = ["train/cross_entropy", "train/accuracy", "train/weight_decay", "train/objective"]
METRICS = [*TRAIN_METRICS, "val/cross_entropy", "val/accuracy"]
UNSUPPORTED = {  # Lightning's callbacks that do not work with this project, and what to use instead
    library.BatchSizeFinder: "Set data.batch_size.",
    library.LearningRateFinder: "Run a range test of learning rates: python -m cifarnet.inspect … lr_find=true.",
    library.ModelPruning: "Prune the trained network: torch.nn.utils.prune with cifarnet.load(…).network.",
    library.BaseFinetuning: "Use recipe.backbone, as in +experiment=finetune, or a class of your own.",
    library.BackboneFinetuning: "Use recipe.backbone, as in +experiment=finetune.",
    # a resumed run would fail, or get other weights
    library.StochasticWeightAveraging: "Use +recipe=swa.",
    library.OnExceptionCheckpoint: "Remove it; last.ckpt is saved after each epoch.",
    library.SpikeDetection: "Remove it; a run that diverges stops with an error.",
}


def make_trainer(
    config: DictConfig,
    callbacks: Sequence[Callback] = (),
    validates: bool = True,
    checkpoint: Checkpoint | None = None,
    **trainer_settings: Any,
) -> L.Trainer:
    """Build Lightning's Trainer with callbacks and loggers; `validates` says whether there are validation images."""
    folder = output_folder(config)
    all_callbacks = [*_callbacks(config, validates), *callbacks]
    _check_callbacks(config, all_callbacks, METRICS if validates else TRAIN_METRICS)
    bars = [callback for callback in all_callbacks if isinstance(callback, ProgressBar)]
    shows_bar = config.trainer.get("enable_progress_bar") is not False
    for bar in bars if not shows_bar else []:
        bar.disable()  # the bar still prints a line after every epoch
    defaults = {
        "default_root_dir": str(folder),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,  # for your own metrics; callbacks.history.History logs the run's metrics once per epoch
        "use_distributed_sampler": False,  # the loader divides batches among the ranks
    }
    settings = {key: value for key, value in defaults.items() if key not in config.trainer}
    if config.trainer.precision == "auto":
        settings["precision"] = hardware.best_precision(config.trainer.accelerator)
    settings |= distributed.trainer_settings(config.trainer)
    freezes = any(isinstance(callback, Freeze) for callback in all_callbacks)
    if freezes and settings.get("strategy", config.trainer.strategy) == "ddp":
        settings["strategy"] = "ddp_find_unused_parameters_true"  # frozen weights get no gradient
    settings |= {
        "callbacks": all_callbacks,
        "plugins": [
            CheckpointIO(checkpoint.content, folder / "checkpoints") if checkpoint else CheckpointIO(),
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
        raise UserError(f"{chosen}: {error} Choose trainer=auto, trainer=cpu or trainer=ddp.") from error
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true requires GPUs. Remove it.")
    return trainer


def prepare(trainer: L.Trainer, classifier: L.LightningModule, data: ImageDataModule) -> None:
    """Prepare the parts of a run for each other.

    Raises:
        UserError: `trainer.limit_test_batches` leaves no batches for the test, which Lightning notices after training.
    """
    limit = trainer.limit_test_batches
    if isinstance(limit, float) and 0 < limit < 1 and limit * (batches := len(data.test_dataloader())) < 1:
        problem = f"trainer.limit_test_batches={limit} of {batches} batches is less than one batch"
        raise UserError(f"{problem}. Use a larger share, or a smaller data.eval_batch_size.")
    # Lightning converts the weights to float64 after it has loaded a checkpoint, whose weights would be rounded
    trainer.precision_plugin.convert_module(classifier)


def make_scheduler(config: DictConfig, validates: bool) -> Callable[[Optimizer, int], LRScheduler]:
    """Return a function that builds the learning-rate schedule from the optimizer and the number of steps."""

    def make(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        if total_steps < 1 and "${total_steps}" in str(OmegaConf.to_container(config.scheduler)):
            remedy = "Set trainer.max_epochs (and trainer.limit_train_batches, if you set it), or scheduler=constant."
            raise UserError(f"scheduler needs the number of steps, which is {total_steps}. {remedy}")
        with as_user_error(f"scheduler, planned for {total_steps} steps"):
            section: Any = OmegaConf.to_container(with_total_steps(config, total_steps).scheduler, resolve=True)
            schedule = _schedule(section, optimizer)
        if isinstance(schedule, ReduceLROnPlateau) and not validates:
            raise UserError(f"scheduler: {type(schedule).__name__} needs validation images. Set data.val_fraction=0.1.")
        return schedule

    return make


def _schedule(settings: dict[str, Any], optimizer: Optimizer) -> LRScheduler:
    """Build a schedule, and first the schedules that SequentialLR and ChainedScheduler combine."""
    parts = settings.pop("schedulers", None)
    make_schedule = instantiate(settings, _partial_=True, _convert_="all")
    if parts is None:
        return expect(LRScheduler, "scheduler", make_schedule(optimizer))
    return make_schedule(optimizer=optimizer, schedulers=[_schedule(part, optimizer) for part in parts])


def _callbacks(config: DictConfig, validates: bool) -> list[Callback]:
    """Build the callbacks of a config, recipes first, so that checkpoints contain the changes that recipes make."""
    named = {"nan": OmegaConf.create({"_target_": DIVERGENCE}), **(config.get("callbacks") or {})}
    sections = [named.pop("nan"), *(config.get("recipe") or {}).values(), *named.values()]
    chosen = [section for section in sections if section]
    if not validates:  # there is no metric by which to choose a checkpoint
        selects = ".ModelCheckpoint val/"
        chosen = [part for part in chosen if selects not in f"{part._target_} {part.get('monitor')}"]
    callbacks = [expect(Callback, section._target_, instantiate(section)) for section in chosen]
    averages = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
    if len(averages) > 1:
        names = " and ".join(averages)
        raise UserError(f"{names} both replace the network's weights with an average. Use only one of them.")
    first = [instantiate({"_target_": STATE})]
    if config.compile:
        first.append(instantiate({"_target_": COMPILE, "mode": config.compile}))
    return first + callbacks


def _check_callbacks(config: DictConfig, callbacks: Sequence[Callback], metrics: Sequence[str]) -> None:
    """Check that Lightning's callbacks work, and that they monitor metrics that a run computes."""
    modules = [config.module._target_, *(type(callback).__module__ for callback in callbacks)]
    may_log_others = not {module.partition(".")[0] for module in modules} <= {"cifarnet", "lightning"}
    for callback in callbacks:
        kind, monitor = type(callback), getattr(callback, "monitor", None)
        for unsupported, remedy in UNSUPPORTED.items():
            if kind is unsupported or (isinstance(callback, unsupported) and unsupported is not library.BaseFinetuning):
                raise UserError(f"callbacks: {kind.__name__} is not supported. {remedy}")
        names = [*metrics, "epoch", "step"] if isinstance(callback, ModelCheckpoint) else metrics
        if monitor not in (None, *names) and not may_log_others:
            problem = f"callbacks: {kind.__name__} monitors {monitor}, which this run does not compute."
            raise UserError(f"{problem} Choose one of these: {', '.join(names)}.")
        best = "max" if str(monitor).endswith("/accuracy") else "min"
        if monitor in METRICS and getattr(callback, "mode", best) != best:
            raise UserError(f"callbacks: {kind.__name__} monitors {monitor} with the wrong mode. Add mode: {best}.")
    keys = [callback.state_key for callback in callbacks if type(callback).state_dict is not Callback.state_dict]
    if repeated := [key for key in keys if keys.count(key) > 1]:  # a checkpoint would have only one of their states
        raise UserError(f"callbacks: two callbacks have the same settings: {repeated[0]}. Change one, or remove it.")


def _loggers(config: DictConfig) -> list[Logger]:
    section = config.get("logger") or {}
    chosen = [section] if "_target_" in section else [logger for logger in section.values() if logger]
    for section in chosen:
        for kind, key, refused in REFUSED:
            value = str(section.get(key))
            if section["_target_"].endswith(kind) and (found := sorted(set(value) & set(refused))):
                raise UserError(f"{key}={value}: {kind} cannot use {' '.join(found)}. Choose another name or folder.")
    return [instantiate(logger) for logger in chosen]


def expect(kind: type[Part], name: str, built: Any) -> Part:
    if not isinstance(built, kind):
        raise UserError(f"{name} builds {type(built).__name__}: expected {kind.__name__}. See --help.")
    return built
