"""A run's config: its schema, and a table of the effects of settings.

The types and ranges of a setting are declared where it is used, as the annotation of an argument:
`drop_rate: Annotated[float, Range(0, below=1)]`. `validate` compares a config with these annotations before anything is
built; the rest of the code trusts the config.
"""

import importlib.util
import json
import pydoc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from cifarnet.errors import UserError
from cifarnet.schema import Range, Seed, check, check_arguments, check_settings, did_you_mean, has_target

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = PACKAGE.parents[1] / "configs"  # in a checkout, installed as editable or by PYTHONPATH=src

# The effect of a setting, or of all settings in a section. A setting that is not listed affects the result.
EFFECTS = {
    "nothing": [
        *("name", "output_dir", "ckpt_path", "classes", "sweep", "logger"),
        *("data.root", "data.url", "start.checkpoint"),  # checksums of the images and weights are recorded instead
        "data.read_only",
        "callbacks.best.dirpath",
        *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
        "trainer.profiler",
    ],
    "speed": [  # these affect the result only by rounding
        *("threads", "keep_freed_memory", "trainer.accelerator", "trainer.deterministic"),
        *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),
        *("data.in_memory", "data.workers", "data.on_device", "model.side_by_side"),
    ],
    "content": ["data.keep", "data.labels"],  # files that can have moved when a run is resumed; it checks their content
    "rounding": [  # these affect the weights only by rounding: they can be changed when a run is resumed
        *("trainer.precision", "compile", "channels_last", "module.tta", "module.tta_share"),
    ],
}


CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

LIBRARY_RANGES = {  # the ranges of Lightning's integer settings, whose types Lightning declares
    "devices": Range(-1, 2**12),
    "num_nodes": Range(1, 2**16),
    "val_check_interval": Range(1, 2**31),
    "accumulate_grad_batches": Range(1, 2**31),
    "check_val_every_n_epoch": Range(1, 2**31),
}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
HYDRA_KEYS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


@dataclass
class RunSettings:
    """The settings at the root of a run's config that no class declares."""

    name: str
    seed: Seed
    threads: Annotated[int, Range(1, 1024)] | None
    compile: bool | CompileMode
    keep_freed_memory: bool
    channels_last: bool
    classes: list[str]


@dataclass
class StartSettings:
    """The section `start` of a run's config; `finetuning.expand` adds the checksum of the checkpoint."""

    checkpoint: str | None
    optimizer: bool | None
    sha256: str


@dataclass
class SweepSettings:
    """The section `sweep` of a run's config."""

    resume: str | None
    keep_checkpoints: Annotated[int, Range(0)] | None
    stop_at_failure: bool


def validate(config: DictConfig) -> None:
    """Check a run's config before anything is read or built.

    Raises:
        UserError: a setting is unknown, is missing, or has an invalid value.
    """
    _check_keys(config)
    check_settings(config, RunSettings)
    check_settings(config.get("sweep") or {}, SweepSettings, "sweep.")
    start: Any = config.get("start") or {}
    keys = {key for key in start if start[key]} if isinstance(start, DictConfig | dict) else {"none"}
    if keys and not {"checkpoint", "sha256"} <= keys <= {*StartSettings.__dataclass_fields__}:
        remedy = "Set only start.checkpoint=RUN and start.optimizer=true, or model=trained model.checkpoint=RUN"
        raise UserError(f"start={start} cannot be used. {remedy}.")
    check_settings(start, StartSettings, "start.")
    for section in ("data", "model", "optimizer", "objective", "trainer", "module"):
        if not has_target(config.get(section)):
            raise UserError(f"{section} has no _target_. Choose one: python -m cifarnet.train --help lists them.")
    for section in ("callbacks", "recipe", "logger", "data.transforms"):
        parts = OmegaConf.select(config, section) or {}
        if not isinstance(parts, DictConfig | dict):
            example = f"{section}.mine={{_target_: …}}"
            raise UserError(f"{section}={parts} must map names to components, such as {example}.")
        is_part = section == "logger" and has_target(parts)  # a single logger, without a name
        for name, part in {} if is_part else parts.items():
            if part is not None and not has_target(part):
                problem = f"{section}.{name}={part} has no _target_."
                component = next((other for other, settings in parts.items() if has_target(settings)), "mine")
                example = f"{section}.{component}.{name}={part}"
                raise UserError(f"{problem} For a setting of a component, write {example}.")
    if (steps := config.get("total_steps")) not in (None, 0):
        raise UserError(f"total_steps={steps} is computed from the data. Remove it, or set +trainer.max_steps={steps}.")
    check_sections(config)
    _check_trainer(config.trainer)
    check("objective.label_smoothing", config.objective.get("label_smoothing", 0), Annotated[float, Range(0, 1)])


def check_sections(config: DictConfig) -> None:
    """Check the settings of all sections against the signatures of their classes and functions.

    Raises:
        UserError: a setting is unknown, missing, of the wrong type or out of range, or a class does not exist.
    """
    for name in config:
        if not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            check_section(str(name), config[name])


def output_folder(config: DictConfig) -> Path:
    """Return the folder of a run.

    Raises:
        UserError: the config was composed outside `python -m cifarnet.train`, without `output_dir`.
    """
    try:
        return Path(config.output_dir)
    except (InterpolationResolutionError, TypeError) as error:  # or null
        raise UserError("output_dir is not set: add output_dir=<folder> to the overrides of compose().") from error


def with_total_steps(config: DictConfig, total_steps: float) -> Any:
    """Return a copy of the config with the number of steps that schedules refer to as `${total_steps}`."""
    return OmegaConf.merge(config, {"total_steps": total_steps})


def flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested config as `section.key: text`, without null values; 1.0 is written as 1."""
    settings: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            settings[f"{prefix}{key}"] = value
        elif value is not None:
            is_whole = isinstance(value, float) and value.is_integer()
            settings[f"{prefix}{key}"] = json.dumps(int(value) if is_whole else value)
    return settings


def deciding_settings(config: Mapping[str, Any], times: bool = False) -> dict[str, str]:
    """Return the settings that affect a run's result, as `flat` writes them; with `times`, also those that affect its
    duration."""
    ignored = ("nothing",) if times else ("nothing", "speed")
    callbacks = config.get("callbacks")
    parts = callbacks.items() if isinstance(callbacks, Mapping) else ()
    observers = [f"callbacks.{name}" for name, part in parts if isinstance(part, Mapping) and _only_observes(part)]
    settings = flat(config).items()
    return {key: value for key, value in settings if effect(key) not in ignored and not is_in(key, observers)}


def check_precision(setting: str, precision: Any) -> None:
    """Check that a precision keeps the weights in float32 or float64; the networks' buffers are not converted.

    Raises:
        UserError: it does not.
    """
    if precision in ("16-true", "bf16-true"):
        mixed = precision.replace("true", "mixed")
        raise UserError(f"{setting}={precision} is not supported: the weights stay in float32. Choose {mixed}.")


def effect(key: str) -> str:
    """Return what a setting affects: "nothing", "speed", "content", "rounding" or "result"."""
    for name, settings in EFFECTS.items():
        if is_in(key, settings):
            return name
    return "result"


def is_in(key: str, sections: Sequence[str]) -> bool:
    """Return whether a setting is one of these, or in one of these sections."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _only_observes(callback: Mapping[str, Any]) -> bool:
    """Return whether a callback does not change the result; callbacks that do are recipes."""
    target = str(callback.get("_target_"))
    is_last_checkpoint = target.endswith(".ModelCheckpoint") and "monitor" not in callback
    return target.startswith("cifarnet.callbacks.") or is_last_checkpoint


def _check_trainer(trainer: DictConfig) -> None:
    for name, limits in LIBRARY_RANGES.items():
        value = trainer.get(name)
        if isinstance(value, int) and value not in limits:
            raise UserError(f"trainer.{name}={value} is out of range: it must be {limits}.")
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={strategy} is not supported. Choose trainer=ddp.")
    check_precision("trainer.precision", trainer.get("precision"))
    max_epochs, max_steps, max_time = (trainer.get(name) for name in ("max_epochs", "max_steps", "max_time"))
    if max_epochs is None and max_steps in (None, -1) and max_time is None:
        raise UserError("trainer.max_epochs=null: use a number of epochs, or -1 to train until you stop the run.")
    if max_epochs == 0:
        raise UserError("trainer.max_epochs=0 would train nothing. Set it to 1 or more.")
    if (folder := trainer.get("default_root_dir")) is not None:
        raise UserError(f"trainer.default_root_dir={folder} is not supported. Set the run's folder: hydra.run.dir=…")
    if (clip := trainer.get("gradient_clip_val") or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val={clip}: use a number above 0, or null for no clipping.")


def _check_keys(config: DictConfig) -> None:
    """Check that every key at the root and in `sweep` is known, or is referenced by another setting."""
    root = [OmegaConf.load(CONFIGS / name) for name in ("train.yaml", "trainer/auto.yaml")]
    known = {str(key) for file in root for key in file} | {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    written = str(OmegaConf.to_container(config, resolve=False))
    sections = {"": (config, known), "sweep.": (config.get("sweep") or {}, {*SweepSettings.__dataclass_fields__})}
    for prefix, (section, options) in sections.items():
        for key in map(str, section):
            is_used = re.search(rf"\$\{{[^}}]*(?<![\w.]){re.escape(prefix + key)}\b", written)
            if key not in options and not is_used:
                suggestion = did_you_mean(key, options) or " Remove it, or correct its name."
                raise UserError(f"{prefix}{key}: unknown setting; nothing uses it.{suggestion}")


def check_section(name: str, node: DictConfig) -> None:
    """Check a section and its subsections."""
    values: dict[str, Any] = {}
    for key in node:
        try:
            values[str(key)] = node[key]
        except MissingMandatoryValue as error:
            raise UserError(f"{name}.{key} is required: add {name}.{key}=…") from error
    if "_target_" in values:
        called = find_callable(f"{name}._target_", str(values["_target_"]))
        arguments = {key: value for key, value in values.items() if key not in HYDRA_KEYS}
        if name == "trainer" and arguments.get("precision") == "auto":  # Lightning does not know this value
            del arguments["precision"]
        check_arguments(name, called, arguments)
    for key, value in values.items():
        members = value if isinstance(value, ListConfig) else [value]
        sections = [member for member in members if isinstance(member, DictConfig)]
        for section in sections:
            check_section(f"{name}.{key}", section)
        if not sections and "_target_" not in values:
            check(f"{name}.{key}", value, Any)


def find_callable(setting: str, target: str) -> Callable[..., Any]:
    """Import the class or function that a setting names, such as `_target_`.

    Raises:
        UserError: it does not exist, or cannot be imported.
    """
    try:
        called = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{setting}={target} cannot be imported: {error.value}. Correct the module.") from error
    if not callable(called):
        library = target.partition(".")[0]
        is_missing = library.isidentifier() and importlib.util.find_spec(library) is None
        remedy = f"The package {library} is not installed: install it." if is_missing else "Check the name."
        raise UserError(f"{setting}={target}: there is no such class or function. {remedy}")
    return called
