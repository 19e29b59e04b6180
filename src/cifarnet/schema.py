"""Types and ranges of settings, which are declared where a setting is used.

The annotation of an argument contains both: `drop_rate: Annotated[float, Range(0, below=1)]`.
"""

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union

from omegaconf import DictConfig, ListConfig, OmegaConf
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from cifarnet.errors import UserError


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
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit:,}" for word, limit in words.items() if math.isfinite(limit))


UNIONS = (Union, types.UnionType)
Seed = Annotated[int, Range(0, 2**32 - 1)]
Pixels = Annotated[int, Range(1, 4096)]  # the height or width of an image


def check_settings(config: Mapping[str, Any] | DictConfig, schema: type, prefix: str = "") -> None:
    """Check settings against the annotated fields of a dataclass; missing settings are ignored.

    Raises:
        UserError: a setting has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    for field in fields(schema):
        if field.name in config:
            check(f"{prefix}{field.name}", config[field.name], hints[field.name])


def check_arguments(name: str, called: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a class or function against its signature.

    Args:
        name: the section of the config that contains them, such as "model".

    Raises:
        UserError: an argument is unknown, has the wrong type or is out of range.
    """
    hints, names = _signature(called)
    for key, value in arguments.items():
        if names is not None and key not in names:
            suggestion = did_you_mean(key, names) or (
                f" Remove this setting. If two of your options set {name}, keep only one of them. To replace the "
                f"whole section, use '~{name}' '+{name}={{_target_: …}}'."
            )
            owner = f"{called.__module__}.{called.__qualname__}"
            raise UserError(f"{name}.{key}={value}: {owner} has no argument {key}.{suggestion}")
        if not any(map(has_target, value if isinstance(value, ListConfig) else [value])):
            check(f"{name}.{key}", value, hints.get(key, Any))


def accepts(called: Callable[..., Any], name: str) -> bool:
    """Whether a class or function has an argument with this name."""
    names = _signature(called)[1]
    return names is None or name in names


def check(name: str, value: Any, hint: Any) -> None:
    """Check the type of a value, and the range of its numbers.

    Args:
        name: the setting, for the message.
        hint: the expected type; `Annotated[…, Range(…)]` declares a range.

    Raises:
        UserError: the value does not fit; the message states the expected type or range.
    """
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if _is_tensor(hint):  # build.make_objective converts a list, such as the weights of the classes
        hint = list[Annotated[float, Range(0)]] | (Literal["balanced"] if name == "objective.weight" else None) | None
    if not (_fits(plain, hint) or (isinstance(plain, list) and _fits(tuple(plain), hint))):
        shown = "null" if value is None else value
        remedy = ""
        if isinstance(plain, str) and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", plain):  # from the environment
            remedy = " The value is a string: remove the quotes, or use ${oc.decode:${oc.env:NAME}}."
        raise UserError(f"{name}={shown} is not valid: expected {_describe(hint)}.{remedy}")
    if plain is not None and "torch.device" in _names(hint):
        _check_device(name, plain)
    is_list = isinstance(plain, list | tuple)
    numbers = [number for number in (plain if is_list else [plain]) if isinstance(number, int | float)]
    for limits in _ranges(hint):
        if (is_list and not plain) or any(number not in limits for number in numbers):
            expected = "one or more numbers, each " if is_list else ""
            raise UserError(f"{name}={value} is out of range: it must be {expected}{limits}.")
    if not all(abs(number) < 2**63 for number in numbers):  # NaN too
        raise UserError(f"{name}={value} is too large or not finite: use a number below 2**63.")


def tensor_arguments(called: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments of a class or function that take a tensor; in a config, they are lists."""
    return {name for name, hint in _signature(called)[0].items() if _is_tensor(hint)}


def did_you_mean(key: str, options: Iterable[str]) -> str:
    """Return a question that suggests the option most similar to `key`, or "" if no option is similar."""
    known = {option.rpartition(".")[2]: option for option in sorted(options, reverse=True)}
    known |= {option: option for option in options}
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    return f" Did you mean {known[near[0]]}?" if near else ""


def has_target(part: Any) -> bool:
    """Whether a part of a config names a class or function."""
    return isinstance(part, DictConfig) and "_target_" in part


def _signature(called: Any) -> tuple[dict[str, Any], set[str] | None]:
    """Return the declared types of the arguments, and the names of all arguments (None if any name is accepted)."""
    functions = [base.__init__ for base in called.__mro__[:-1]] if isinstance(called, type) else [called]
    hints: dict[str, Any] = {}
    for function in reversed(functions):
        try:
            hints.update(typing.get_type_hints(function, include_extras=True))
        except Exception:  # a name that exists only for type checkers
            continue
    names: set[str] = set()
    for function in functions:  # a class with **kwargs passes unknown arguments to its base class
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return hints, None
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return hints, names
    return hints, None


def _names(hint: Any) -> set[str]:
    """Return the names of the types in a union; names, because torch imports slowly."""
    return {inspect.formatannotation(part) for part in typing.get_args(hint) or [hint]}


def _is_tensor(hint: Any) -> bool:
    return _names(hint) - {"None", "NoneType"} == {"torch.Tensor"}


def _check_device(name: str, value: Any) -> None:
    import torch

    try:
        torch.device(value)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}={value} is not a device: {reason}. Set it to null, cpu or cuda.") from error


def _fits(value: Any, hint: Any) -> bool:
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return not isinstance(value, bool) or hint is Any or bool in (hint, *typing.get_args(hint))  # True is not a number


def _ranges(hint: Any) -> Iterator[Range]:
    """Yield all ranges in a type, such as `Sequence[Annotated[int, Range(1, 9)]] | None`."""
    yield from (member for member in getattr(hint, "__metadata__", ()) if isinstance(member, Range))
    for part in typing.get_args(hint):
        yield from _ranges(part)


def _describe(hint: Any) -> str:
    """Describe a type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if Callable in (hint, origin):
        return "a section with a _target_"
    if origin is Annotated:
        return _describe(arguments[0])
    if origin in (list, Sequence) and arguments:
        return f"a list like […, …] of {_describe(arguments[0]).removeprefix('a ')}s"
    if origin not in (Literal, *UNIONS):
        return words.get(hint) or inspect.formatannotation(hint)
    *others, last = dict.fromkeys(_alternatives(hint))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any) -> list[str]:
    """Describe each value of a literal, and each type of a union."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(map(str, arguments))
    if typing.get_origin(hint) in UNIONS:
        return [text for argument in arguments for text in _alternatives(argument)]
    return ["true", "false"] if hint is bool else [_describe(hint)]
