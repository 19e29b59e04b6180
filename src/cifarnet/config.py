"""A run's config: the schema that validates it, and the table of what depends on each setting.

The types and ranges of a setting are declared where it is used, as the annotation of an argument:
`drop_rate: Annotated[float, Range(0, below=1)]`. `validate` compares a config with these annotations before anything is
built; the rest of the code trusts the config.
"""

import difflib
import importlib.util
import inspect
import json
import math
import pydoc
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from cifarnet.errors import UserError

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = PACKAGE.parents[1] / "configs"  # in a checkout, installed as editable or by PYTHONPATH=src

# What depends on a setting, or on all settings of a section. A setting that is not listed decides the result.
EFFECTS = {
    "nothing": [
        *("name", "output_dir", "ckpt_path", "classes", "sweep", "logger"),
        *("data.root", "data.url", "start.checkpoint"),  # checksums of their contents are recorded
        *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
        "trainer.profiler",
    ],
    "speed": [  # and the result only by rounding
        *("threads", "keep_freed_memory", "trainer.accelerator", "trainer.deterministic"),
        *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),
        *("data.in_memory", "data.workers", "data.on_device", "model.side_by_side"),
    ],
    "rounding": [  # the result, but the weights only by rounding: they can be changed when a run is resumed
        *("trainer.precision", "compile", "channels_last", "module.tta", "module.tta_share"),
    ],
}


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, above `above` and below `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below  # false for NaN

    def __str__(self) -> str:
        words = {"from": self.least, "above": self.above, "to": self.most, "and below": self.below}
        return " ".join(f"{word} {limit:,}" for word, limit in words.items() if math.isfinite(limit))


Seed = Annotated[int, Range(0, 2**32 - 1)]
Pixels = Annotated[int, Range(1, 4096)]  # the height or width of an image
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

LIBRARY_RANGES = {  # of whole numbers whose types Lightning declares
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
class SweepSettings:
    """The section `sweep` of a run's config."""

    resume: str | None
    keep_checkpoints: Annotated[int, Range(0)] | None
    stop_at_failure: bool


def validate(config: DictConfig) -> None:
    """Check a run's config before anything is read or built.

    Raises:
        UserError: a setting is unknown, is missing, or has a value that cannot be used. The message names the setting,
            its value and what to do.
    """
    _check_keys(config)
    check_settings(config, RunSettings)
    check_settings(config.get("sweep") or {}, SweepSettings, "sweep.")
    for section in ("data", "model", "optimizer", "objective", "trainer", "module"):
        if not _has_target(config.get(section)):
            raise UserError(
                f"{section} has no _target_. Choose one: python -m cifarnet.train --help lists the choices."
            )
    for section in ("callbacks", "recipe", "logger"):
        parts = config.get(section) or {}
        if not isinstance(parts, DictConfig | dict):
            raise UserError(f"{section}={parts} is not a mapping of names, such as {section}.mine={{_target_: …}}.")
        for name, part in {} if _has_target(parts) else parts.items():
            if part is not None and not _has_target(part):
                raise UserError(f"{section}.{name}={part} has no _target_.")
    check_sections(config)
    _check_trainer(config.trainer)
    check("objective.label_smoothing", config.objective.get("label_smoothing", 0), Annotated[float, Range(0, 1)])


def check_sections(config: DictConfig) -> None:
    """Compare the settings of all sections with what the classes and functions that they name declare.

    Raises:
        UserError: a setting is unknown, is missing or has another type or range, or a class does not exist.
    """
    for name in config:
        if not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            _check_node(str(name), config[name])


def check_settings(config: Mapping[str, Any] | DictConfig, schema: type, prefix: str = "") -> None:
    """Check settings against the annotated fields of a dataclass; settings that are missing are left alone.

    Raises:
        UserError: a setting has another type or range.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    for field in fields(schema):
        if field.name in config:
            check(f"{prefix}{field.name}", config[field.name], hints[field.name])


def check_arguments(name: str, called: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a class or function against its signature.

    Args:
        name: the section of the config that they come from, such as "model".

    Raises:
        UserError: an argument is unknown, or has another type or range.
    """
    hints, names = _signature(called)
    for key, value in arguments.items():
        if names is not None and key not in names:
            suggestion = did_you_mean(key, names) or (
                f" Remove it. If two choices both set {name}, use only one of them; to replace the whole section, "
                f"give '~{name}' '+{name}={{_target_: …}}'."
            )
            owner = f"{called.__module__}.{called.__qualname__}"
            raise UserError(f"{name}.{key}={value}: {owner} has no argument {key}.{suggestion}")
        if not _has_target(value):
            check(f"{name}.{key}", value, hints.get(key, Any))


def check(name: str, value: Any, hint: Any) -> None:
    """Check the type of one value, and the range of its numbers.

    Args:
        name: the setting, for the message.
        hint: a type, in which `Annotated[…, Range(…)]` declares a range.

    Raises:
        UserError: the value does not fit; the message says what does.
    """
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if not (_fits(plain, hint) or (isinstance(plain, list) and _fits(tuple(plain), hint))):
        raise UserError(f"{name}={value} has the wrong type: expected {_describe(hint)}.")
    is_list = isinstance(plain, list | tuple)
    numbers = [number for number in (plain if is_list else [plain]) if isinstance(number, int | float)]
    for limits in _ranges(hint):
        if (is_list and not plain) or any(number not in limits for number in numbers):
            expected = "one or more numbers, each" if is_list else "a number"
            raise UserError(f"{name}={value} is out of range: give {expected} {limits}.")
    if not all(abs(number) < 2**63 for number in numbers):  # NaN too
        raise UserError(f"{name}={value} is not a finite number.")


def did_you_mean(key: str, options: Iterable[str]) -> str:
    """Return the option that is most similar to a wrong one, as a question; the empty string if there is none."""
    known = {option.rpartition(".")[2]: option for option in sorted(options, reverse=True)}
    known |= {option: option for option in options}
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    return f" Did you mean {known[near[0]]}?" if near else ""


def flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested config as `section.key: text`, without the values that are null; 1.0 is written as 1."""
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
    """Return the settings that decide a run's result, as `flat` writes them; with `times`, also those that decide how
    long it takes."""
    ignored = ("nothing",) if times else ("nothing", "speed")
    callbacks = config.get("callbacks")
    observers = {
        f"callbacks.{name}"
        for name, callback in (callbacks.items() if isinstance(callbacks, Mapping) else ())
        if isinstance(callback, Mapping) and _only_observes(callback)
    }
    return {
        key: value
        for key, value in flat(config).items()
        if effect(key) not in ignored and not any(key.startswith(f"{observer}.") for observer in observers)
    }


def effect(key: str) -> str:
    """Return what depends on a setting: "nothing", "speed", "rounding" or "result"."""
    for name, settings in EFFECTS.items():
        if any(f"{key}.".startswith(f"{setting}.") for setting in settings):
            return name
    return "result"


def _only_observes(callback: Mapping[str, Any]) -> bool:
    """Whether a callback does not change the result: those that do are recipes."""
    target = str(callback.get("_target_"))
    is_last_checkpoint = target.endswith(".ModelCheckpoint") and "monitor" not in callback
    return target.startswith("cifarnet.callbacks.") or is_last_checkpoint


def _check_trainer(trainer: DictConfig) -> None:
    for name, limits in LIBRARY_RANGES.items():
        value = trainer.get(name)
        if isinstance(value, int) and value not in limits:
            raise UserError(f"trainer.{name}={value} is out of range: give a whole number {limits}.")
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={strategy} is not supported. Choose trainer=ddp.")
    precision = str(trainer.get("precision"))
    if precision in ("16-true", "bf16-true"):
        mixed = precision.replace("true", "mixed")
        raise UserError(f"trainer.precision={precision} is not supported: weights stay in float32. Choose {mixed}.")
    max_epochs, max_steps, max_time = (trainer.get(name) for name in ("max_epochs", "max_steps", "max_time"))
    if max_epochs is None and max_steps in (None, -1) and max_time is None:
        raise UserError("trainer.max_epochs=null: give a number of epochs, or -1 to train until you stop the run.")
    if max_epochs == 0:
        raise UserError("trainer.max_epochs=0 trains nothing. Give 1 or more.")
    if (folder := trainer.get("default_root_dir")) is not None:
        raise UserError(f"trainer.default_root_dir={folder}: a run has one folder. Set it with hydra.run.dir=…")
    if (clip := trainer.get("gradient_clip_val") or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val={clip}: give a number above 0, or null for no clipping.")


def _check_keys(config: DictConfig) -> None:
    """Check that every key at the root, and in `sweep`, is known, or that another setting refers to it."""
    root = [OmegaConf.load(CONFIGS / name) for name in ("train.yaml", "trainer/auto.yaml")]
    known = {str(key) for file in root for key in file} | {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    written = str(OmegaConf.to_container(config, resolve=False))
    sections = {"": (config, known), "sweep.": (config.get("sweep") or {}, {*SweepSettings.__dataclass_fields__})}
    for prefix, (section, options) in sections.items():
        for key in map(str, section):
            is_used = re.search(rf"\$\{{[^}}]*(?<![\w.]){re.escape(prefix + key)}\b", written)
            if key not in options and not is_used:
                raise UserError(f"{prefix}{key}: unknown setting; nothing uses it.{did_you_mean(key, options)}")


def _check_node(name: str, node: DictConfig) -> None:
    """Check a section, and the sections inside it."""
    values: dict[str, Any] = {}
    for key in map(str, node):
        try:
            values[key] = node[key]
        except MissingMandatoryValue as error:
            raise UserError(f"{name}.{key} is required: add {name}.{key}=…") from error
    if "_target_" in values:
        called = _locate(f"{name}._target_", str(values["_target_"]))
        arguments = {key: value for key, value in values.items() if key not in HYDRA_KEYS}
        if name == "trainer" and arguments.get("precision") == "auto":  # not one of Lightning's values
            del arguments["precision"]
        check_arguments(name, called, arguments)
    for key, value in values.items():
        if isinstance(value, DictConfig):
            _check_node(f"{name}.{key}", value)
        elif "_target_" not in values:
            check(f"{name}.{key}", value, Any)


def _has_target(part: Any) -> bool:
    return isinstance(part, DictConfig) and "_target_" in part


def _locate(name: str, target: str) -> Callable[..., Any]:
    """Import the class or function that `_target_` names."""
    try:
        called = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{name}={target} cannot be imported: {error.value}") from error
    if not callable(called):
        library = target.partition(".")[0]
        is_missing = library.isidentifier() and importlib.util.find_spec(library) is None
        reason = f": the package {library} is not installed" if is_missing else ""
        raise UserError(f"{name}={target}: there is no such class or function{reason}. Check the name.")
    return called


def _signature(called: Any) -> tuple[dict[str, Any], set[str] | None]:
    """Return the declared types of the arguments, and the names of all arguments, or None if it takes any name."""
    functions = [base.__init__ for base in called.__mro__[:-1]] if isinstance(called, type) else [called]
    hints: dict[str, Any] = {}
    for function in reversed(functions):
        try:
            hints.update(typing.get_type_hints(function, include_extras=True))
        except Exception:  # a name that exists only for type checkers
            continue
    names: set[str] = set()
    for function in functions:  # a class passes arguments that it does not know to its base class, if it takes any name
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return hints, None
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return hints, names
    return hints, None


def _fits(value: Any, hint: Any) -> bool:
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return not isinstance(value, bool) or hint is Any or bool in (hint, *typing.get_args(hint))  # True is no number


def _ranges(hint: Any) -> Iterator[Range]:
    """Yield the ranges anywhere in a type, such as `Sequence[Annotated[int, Range(1, 9)]] | None`."""
    yield from (member for member in getattr(hint, "__metadata__", ()) if isinstance(member, Range))
    for part in typing.get_args(hint):
        yield from _ranges(part)


def _describe(hint: Any) -> str:
    """Describe a type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        return words.get(hint) or inspect.formatannotation(hint)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (list, Sequence) and arguments:
        return f"a list like […, …] of {_describe(arguments[0]).removeprefix('a ')}s"
    return " or ".join(dict.fromkeys(map(_describe, arguments)))


def checked(section: str) -> Callable[[Callable], Callable]:
    """Return a decorator that does nothing; to be removed."""
    return lambda function: function
