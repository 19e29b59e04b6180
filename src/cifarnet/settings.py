"""Settings: whether they can be used, and what depends on them."""

import inspect
import json
import pydoc
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from typeguard import CollectionCheckStrategy, TypeCheckError
from typeguard import check_type as compare

from cifarnet.errors import UserError

# on these no figure depends: where things lie, what they are called, what is shown meanwhile
PLACES = {"name", "output_dir", "ckpt_path", "classes", "sweep", "logger", "data.root", "data.url"}
SHOWN = {f"trainer.{name}" for name in ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler")}
# on these only times depend, and accuracies but by rounding
SPEED = {
    *("threads", "keep_freed_memory", "trainer.accelerator", "trainer.devices", "trainer.deterministic"),
    *("data.in_memory", "data.workers", "data.on_device", "model.side_by_side"),
}


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as `section.key: text`; what is null is left out, and 1.0 is 1."""
    settings: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            settings[prefix + key] = value
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer()
            settings[prefix + key] = json.dumps(int(value) if whole else value)
    return settings


def deciding(config: Mapping[str, Any], times: bool = False) -> dict[str, str]:
    """The settings, as `flat` writes them, on which a run's figures depend, or, with `times`, its seconds too."""
    without = PLACES | SHOWN | (set() if times else SPEED)
    watching = {
        f"callbacks.{name}"
        for name, callback in (config.get("callbacks") or {}).items()
        if callback and _watches(callback)
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
    return target.startswith("cifarnet.runs.") or keeps_only


def check(config: DictConfig) -> None:
    """Refuse a run's settings that cannot work before anything is read or built.

    Raises:
        UserError: the message names the setting, its value and what to do.
    """
    for section in ("data", "model", "optimizer", "objective", "trainer", "module"):
        if "_target_" not in (config.get(section) or {}):
            raise UserError(f"{section} names nothing to build (no _target_). See the choices: --help")
    switches = dict.fromkeys(("compile", "keep_freed_memory", "channels_last"), bool)
    for name, hint in {"name": str, "seed": int, "threads": int | None, **switches}.items():
        check_type(name, config[name], hint)
    check_types(config)
    for name, least in [("seed", 0), ("threads", 1)]:
        if config[name] is not None and config[name] < least:
            raise UserError(f"{name}={config[name]}: give a whole number, {least} or more.")
    if config.trainer.max_epochs == 0:
        raise UserError("trainer.max_epochs=0 trains nothing. Give 1 or more.")


def check_types(config: DictConfig) -> None:
    """Compare the settings with the types that the classes and functions to be called declare.

    Raises:
        UserError: a setting of another type; a required setting that is missing.
    """
    for section in config:
        if not OmegaConf.is_missing(config, section) and isinstance(node := config[section], DictConfig):
            _check_node(str(section), node)


def _check_node(name: str, node: DictConfig) -> None:
    hints = _hints(node["_target_"]) if "_target_" in node else {}
    for key in node:
        try:
            value = node[key]
        except MissingMandatoryValue as error:
            raise UserError(f"{name}.{key} is needed: add {name}.{key}=…") from error
        if isinstance(value, DictConfig):
            _check_node(f"{name}.{key}", value)
        elif key in hints and (name, key, value) != ("trainer", "precision", "auto"):  # which is not Lightning's word
            check_type(f"{name}.{key}", value, hints[key])


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a setting whose value is not what a type hint says."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
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


def _hints(target: str) -> dict[str, Any]:
    """The declared types of a class's or function's arguments, those of base classes included."""
    try:
        called = pydoc.locate(target)
    except pydoc.ErrorDuringImport:
        return {}  # building it will say what is wrong
    functions: list[Any] = [called]
    if isinstance(called, type):
        functions = [base.__init__ for base in reversed(called.__mro__)]
    hints: dict[str, Any] = {}
    for function in functions:
        try:
            hints.update(typing.get_type_hints(function))
        except Exception:  # a name that exists for type checkers only: nothing to compare with
            continue
    return hints
