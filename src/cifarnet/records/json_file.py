"""Dataclasses that are stored as JSON files, and the one way in which files are read."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from cifarnet.errors import UserError
from cifarnet.system import files

T = TypeVar("T", bound="JsonFile")
Content = TypeVar("Content")
UNREADABLE = (OSError, ValueError, TypeError, RecursionError, OverflowError, TypeCheckError, yaml.YAMLError)


def read(path: Path, parse: Callable[[str], Content], remedy: str = "") -> Content:
    """Return the parsed content of a text file.

    Raises:
        UserError: the file cannot be read or parsed.
    """
    try:
        return parse(path.read_text("utf-8"))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}{remedy}.") from error


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file. NaN and infinity, which JSON lacks, become null."""
    files.write(path, json.dumps(_without_nan(content), indent=2, ensure_ascii=False) + "\n")


class JsonFile:
    """Base class of dataclasses that are stored as JSON files, a key for each field.

    The types of the fields are checked when a file is read. Unknown keys are ignored, and null becomes NaN in fields
    that are declared as numbers.
    """

    @classmethod
    def read(cls: type[T], path: Path) -> T:
        """Return the content of a file.

        Raises:
            UserError: the file cannot be read, or a field is missing or has the wrong type.
        """
        return read(path, lambda text: _from_json(cls, json.loads(text)), "; delete it or repeat the run")

    def write(self, path: Path) -> None:
        """Write the file. NaN and infinity, which JSON lacks, become null."""
        write_json(vars(self), path)


def _from_json(cls: type[T], content: Any) -> T:
    check_type(content, dict[str, Any])
    hints, values = get_type_hints(cls), {}
    for name in content.keys() & {field.name for field in fields(cls)}:  # pyright: ignore[reportArgumentType]
        value = _with_nan(content[name], hints[name])
        try:
            check_type(value, hints[name], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            raise TypeError(f"{name}: {error}") from error
        values[name] = value
    return cls(**values)


def _with_nan(value: Any, hint: Any) -> Any:
    """Replace null by NaN where a number is declared."""
    if hint is float:
        return math.nan if value is None else value
    if get_origin(hint) is list and isinstance(value, list):
        return [_with_nan(item, get_args(hint)[0]) for item in value]
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _with_nan(item, get_args(hint)[1]) for key, item in value.items()}
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
