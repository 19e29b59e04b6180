"""Which numbers an argument may be, declared in its type: `share: Annotated[float, Range(0, 1)]`."""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cifarnet.errors import UserError


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


def check(name: str, value: Any, hint: Any) -> None:
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
                check(f"{section}.{name}", value, hints.get(name))
            return function(*args, **settings)

        return call

    return decorate


def _limits(hint: Any) -> Iterator[Range]:
    """Those anywhere in a type: `Sequence[Annotated[int, Range(1, 9)]] | None`."""
    yield from (member for member in getattr(hint, "__metadata__", ()) if isinstance(member, Range))
    for part in typing.get_args(hint):
        yield from _limits(part)
