"""A run's config: whether its settings can be used, and what depends on them.

Ranges of numbers are declared in an argument's type: `share: Annotated[float, Range(0, 1)]`.
"""

import difflib
import functools
import importlib.util
import inspect
import json
import math
import pydoc
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from typeguard import CollectionCheckStrategy, TypeCheckError
from typeguard import check_type as compare

from cifarnet.errors import UserError

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = PACKAGE.parents[1] / "configs"  # in a checkout, installed as editable or by PYTHONPATH=src

# on these no figure depends: where things lie, what they are called, what is shown meanwhile
PLACES = {"name", "output_dir", "ckpt_path", "classes", "sweep", "logger", "data.root", "data.url", "start.checkpoint"}
SHOWN = {f"trainer.{name}" for name in ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler")}
# on these only times depend, and accuracies but by rounding
SPEED = {
    *("threads", "keep_freed_memory", "trainer.accelerator", "trainer.deterministic"),
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("data.in_memory", "data.workers", "data.on_device", "model.side_by_side"),
}

Modes = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # of torch.compile

# whole numbers, from the least to the largest that works
RANGES = {
    "seed": (0, 2**32 - 1),
    "threads": (1, 1024),
    "trainer.devices": (-1, 2**12),
    "trainer.num_nodes": (1, 2**16),
    "trainer.val_check_interval": (1, 2**31),
    "trainer.accumulate_grad_batches": (1, 2**31),
    "trainer.check_val_every_n_epoch": (1, 2**31),
}

HYDRAS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}  # which say how to build


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; and, where they are given, only those above or below a limit."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below  # no NaN is

    def __str__(self) -> str:
        words = {"from": self.least, "above": self.above, "to": self.most, "and below": self.below}
        return " ".join(f"{word} {limit:,}" for word, limit in words.items() if math.isfinite(limit))


Seed = Annotated[int, Range(0, 2**32 - 1)]
Pixels = Annotated[int, Range(1, 4096)]  # of an image's side


def check_range(name: str, value: Any, hint: Any) -> None:
    """Refuse a number, or a list of them, that its declared type excludes.

    Raises:
        UserError: the message has the name, the value and what may be given.
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = list(value) if several else [value]
    for limits in _limits(hint):
        if not numbers or any(isinstance(number, int | float) and number not in limits for number in numbers):
            what = "one or more numbers, each" if several else "a number"
            raise UserError(f"{name}={numbers if several else value}: give {what} {limits}.")


def checked(section: str) -> Callable[[Callable], Callable]:
    """Let a constructor, whose arguments are settings of a config's section, refuse numbers out of their range."""

    def decorate(function: Callable) -> Callable:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **settings: Any) -> Any:
            for name, value in signature.bind(*args, **settings).arguments.items():
                check_range(f"{section}.{name}", value, hints.get(name))
            return function(*args, **settings)

        return call

    return decorate


def _limits(hint: Any) -> Iterator[Range]:
    """Those anywhere in a type: `Sequence[Annotated[int, Range(1, 9)]] | None`."""
    yield from (member for member in getattr(hint, "__metadata__", ()) if isinstance(member, Range))
    for part in typing.get_args(hint):
        yield from _limits(part)


def did_you_mean(key: str, options: Iterable[str]) -> str:
    """The option that is most like a wrong one, as a question; empty if none is."""
    known = {option.rpartition(".")[2]: option for option in sorted(options, reverse=True)}
    known |= {option: option for option in options}
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    return f" Did you mean {known[near[0]]}?" if near else ""


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as `section.key: text`; what is null is left out, and 1.0 is 1."""
    settings: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            settings[f"{prefix}{key}"] = value
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer()
            settings[f"{prefix}{key}"] = json.dumps(int(value) if whole else value)
    return settings


def deciding_settings(config: Mapping[str, Any], times: bool = False) -> dict[str, str]:
    """The settings, as `flat` writes them, on which a run's figures depend, or, with `times`, its seconds too."""
    without = PLACES | SHOWN | (set() if times else SPEED)
    callbacks = config.get("callbacks")
    watching = {
        f"callbacks.{name}"
        for name, callback in (callbacks if isinstance(callbacks, Mapping) else {}).items()
        if isinstance(callback, Mapping) and _watches(callback)
    }
    return {key: value for key, value in flat(config).items() if not within(key, without | watching)}


def within(key: str, sections: set[str]) -> bool:
    """Is it one of these settings, or in one of these sections?"""
    parts = key.split(".")
    return any(".".join(parts[:depth]) in sections for depth in range(1, len(parts) + 1))


def _watches(callback: Mapping[str, Any]) -> bool:
    """A callback that changes no figure: this project's own lie in `runs`, those that change training in `recipes`."""
    target = str(callback.get("_target_"))
    keeps_only = target.endswith(".ModelCheckpoint") and "monitor" not in callback
    return target.startswith("cifarnet.callbacks.") or keeps_only


def validate(config: DictConfig) -> None:
    """Refuse a run's settings that cannot work before anything is read or built.

    Raises:
        UserError: the message names the setting, its value and what to do.
    """
    _check_known(config)
    for section in ("data", "model", "optimizer", "objective", "trainer", "module"):
        if not _names_something(config.get(section)):
            raise UserError(f"{section} names nothing to build (no _target_). See the choices: --help")
    for section in ("callbacks", "recipe", "logger"):
        parts = config.get(section) or {}
        if not isinstance(parts, DictConfig | dict):
            raise UserError(
                f"{section}={parts}: give what is to be built by names, such as {section}.mine={{_target_: …}}"
            )
        for name, part in ({} if section == "logger" and _names_something(parts) else parts).items():
            if part is not None and not _names_something(part):
                raise UserError(f"{section}.{name}={part} names nothing to build (no _target_).")
    switches = {"compile": bool | Modes, "keep_freed_memory": bool, "channels_last": bool}
    kept = {"sweep.keep_checkpoints": int | None, "sweep.resume": str | None}
    for name, hint in {"name": str, "seed": int, "threads": int | None, **switches, **kept}.items():
        check_type(name, OmegaConf.select(config, name), hint)
    check_types(config)
    for name, (least, most) in RANGES.items():
        value = OmegaConf.select(config, name)
        if isinstance(value, int) and not least <= value <= most:
            raise UserError(f"{name}={value}: give a whole number from {least} to {most}.")
    if str(config.trainer.get("precision")) in ("16-true", "bf16-true"):
        raise UserError(
            f"trainer.precision={config.trainer.precision}: weights are kept in float32 here. Choose "
            f"{config.trainer.precision.replace('true', 'mixed')}."
        )
    limits = [config.trainer.get(name) for name in ("max_epochs", "max_steps", "max_time")]
    if limits[0] is None and limits[1] in (None, -1) and limits[2] is None:
        raise UserError("trainer.max_epochs=null: give a number of epochs, or -1 to train until you stop it.")
    if (folder := config.trainer.get("default_root_dir")) is not None:
        raise UserError(f"trainer.default_root_dir={folder}: a run has one folder. Say where with hydra.run.dir=…")
    if (clip := config.trainer.get("gradient_clip_val") or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val={clip}: give a number above 0, or null to clip nothing.")
    if config.trainer.max_epochs == 0:
        raise UserError("trainer.max_epochs=0 trains nothing. Give 1 or more.")


def _names_something(part: Any) -> bool:
    return isinstance(part, DictConfig) and "_target_" in part


def _check_known(config: DictConfig) -> None:
    """Refuse what was added, and is neither a setting of a run's config nor asked for by `${…}` in it."""
    files = [OmegaConf.load(CONFIGS / name) for name in ("train.yaml", "trainer/auto.yaml")]
    known = {str(key) for file in files for key in file} | {path.stem for path in CONFIGS.glob("*") if path.is_dir()}
    written = str(OmegaConf.to_container(config, resolve=False))
    for name, options in {"": known, "sweep.": set(files[0].sweep)}.items():
        for key in OmegaConf.select(config, name.rstrip("."), default={}) if name else config:
            if key not in options and not re.search(rf"\$\{{[^}}]*(?<![\w.]){name}{re.escape(key)}\b", written):
                raise UserError(f"{name}{key} is no setting, and nothing asks for it.{did_you_mean(key, options)}")


def check_types(config: DictConfig) -> None:
    """Compare the settings with what the classes and functions to be called declare.

    Raises:
        UserError: a setting that is unknown or of another type, a number that is none, a required setting that is
            missing, a class that does not exist.
    """
    for section in config:
        if OmegaConf.is_missing(config, section):
            continue
        if isinstance(node := config[section], DictConfig):
            _check_node(str(section), node)
        else:
            _check_finite(str(section), node)


def _check_node(name: str, node: DictConfig) -> None:
    hints, names = ({}, None) if "_target_" not in node else _signature(f"{name}._target_", node["_target_"])
    for key in node:
        try:
            value = node[key]
        except MissingMandatoryValue as error:
            raise UserError(f"{name}.{key} is needed: add {name}.{key}=…") from error
        if names is not None and key not in names | HYDRAS:
            raise _unknown(name, str(key), node, names)
        if isinstance(value, DictConfig):
            _check_node(f"{name}.{key}", value)
        if _names_something(value):
            continue
        if key in hints and (name, key, value) != ("trainer", "precision", "auto"):  # which is not Lightning's word
            check_type(f"{name}.{key}", value, hints[key])
        _check_finite(f"{name}.{key}", value)


def _unknown(name: str, key: str, node: DictConfig, names: set[str]) -> UserError:
    """That a class has no such setting: a wrong name, or one that another class's config left there."""
    files = {path: OmegaConf.select(OmegaConf.load(path), name) for path in sorted(CONFIGS.glob("recipe/*.yaml"))}
    chosen = [path for path, part in files.items() if _names_something(part) and set(part) <= set(node)]
    if len(chosen) > 1:  # all that each of them sets is there
        heads = [path.read_text("utf-8").splitlines()[1].lstrip("# ") for path in chosen]
        recipes = " and ".join(path.stem for path in chosen)
        return UserError(f"The recipes {recipes} are both {name}: choose one. {'. '.join(heads)}.")
    meant = did_you_mean(key, names)
    if not meant:
        kept = ", ".join(f"{known}: {node[known]}" for known in node if known in {"_target_", *names})
        meant = f" Leave it out, or replace all of {name}: '~{name}' '+{name}={{{kept}}}'"
    return UserError(f"{name}.{key}={node[key]}: {node['_target_']} has no such setting.{meant}")


def _check_finite(name: str, value: Any) -> None:
    for number in value if isinstance(value, ListConfig) else [value]:
        if isinstance(number, int | float) and not abs(number) < 2**63:  # NaN too
            raise UserError(f"{name}={value}: give a number that is finite.")


def check_own(config: DictConfig, types: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    """Refuse a command's own settings that are not of their types, or numbers out of their ranges."""
    for name, hint in types.items():
        check_type(name, config[name], hint)
        check_range(name, config[name], allowed.get(name))


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a setting whose value is not what a type hint says."""
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if not (_fits(plain, hint) or (isinstance(plain, list) and _fits(tuple(plain), hint))):
        raise UserError(f"{name}={value} has the wrong type: expected {_words(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    try:
        compare(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return not isinstance(value, bool) or hint is Any or bool in (hint, *typing.get_args(hint))  # True is no number


def _words(hint: Any) -> str:
    """A type hint as people say it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if typing.get_origin(hint) in (list, typing.get_origin(typing.Sequence[int])) and typing.get_args(hint):
        return f"a list like […, …] of {_words(typing.get_args(hint)[0]).removeprefix('a ')}s"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is None:
        return words.get(hint) or inspect.formatannotation(hint)
    return " or ".join(dict.fromkeys(map(_words, typing.get_args(hint))))


def _signature(name: str, target: Any) -> tuple[dict[str, Any], set[str] | None]:
    """The declared types of a class's or function's arguments, and the names of all; None where it takes any."""
    try:
        called = pydoc.locate(str(target))
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{name}={target} cannot be imported: {error.value}") from error
    if not callable(called):
        library = str(target).partition(".")[0]
        missing = library.isidentifier() and importlib.util.find_spec(library) is None
        why = f", for there is no package {library}: install it, or mend the name" if missing else ""
        raise UserError(f"{name}={target}: there is no such class or function{why}.")
    functions = [base.__init__ for base in called.__mro__[:-1]] if isinstance(called, type) else [called]
    hints: dict[str, Any] = {}
    for function in reversed(functions):
        try:
            hints.update(typing.get_type_hints(function))
        except Exception:  # a name that exists for type checkers only: nothing to compare with
            continue
    names: set[str] = set()
    for function in functions:  # a class hands on what it does not know to the next one, if it takes any
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return hints, None
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return hints, names
    return hints, None
