"""Dataclasses stored as JSON files."""

import json
import math
from pathlib import Path
from typing import Any, TypedDict, TypeVar, get_type_hints

from typeguard import CollectionCheckStrategy, check_type

from cifarnet.system import files

T = TypeVar("T", bound="JsonFile")
LARGEST = 1e100  # the squares of larger numbers exceed the range of floats


def _check_number(number: float) -> float:
    if abs(number) >= LARGEST:
        raise ValueError(f"it contains a number of {LARGEST:.0e} or more")
    return number


class JsonFile:
    """Base class of dataclasses that are stored as JSON files, with a key for each field.

    The types of the fields are checked when a file is read. Unknown keys are ignored.
    """

    @classmethod
    def read(cls: type[T], path: Path) -> T:
        """Return the content of a file. NaN and infinity are read as null; fields declared as float are then NaN.

        Raises:
            UserError: the file cannot be read, or a field is missing or not valid.
        """
        hints = get_type_hints(cls)

        def parse(text: str) -> T:
            hooks: Any = {
                "parse_int": lambda digits: _check_number(int(digits)),
                "parse_float": lambda digits: _check_number(float(digits)),
                "parse_constant": lambda _: None,
            }
            values = {name: value for name, value in dict(json.loads(text, **hooks)).items() if name in hints}
            nulls = {name for name, value in values.items() if value is None and hints[name] is float}
            if missing := [name for name in hints if name not in values and not hasattr(cls, name)]:
                raise ValueError(f"it has no {', '.join(missing)}")
            content = cls(**values | dict.fromkeys(nulls, math.nan))
            schema = TypedDict(cls.__name__, hints)  # pyright: ignore[reportArgumentType]
            check_type(vars(content), schema, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            return content

        return files.read(path, parse, "; delete it or repeat the run")

    def write(self, path: Path) -> None:
        """Write the file. NaN and infinity, which JSON lacks, become null."""
        finite = json.loads(json.dumps(vars(self)), parse_constant=lambda _: None)
        files.write(path, json.dumps(finite, indent=2, ensure_ascii=False) + "\n")
