"""What a sweep or a search takes its values from, in Hydra's words, such as `tag(log,interval(0.001,0.1))`."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from cifarnet.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST = 10_000  # values that a sweep lists


def asked(lines: Sequence[str], loader: ConfigLoader) -> "tuple[list[str], dict[str, BaseDistribution]]":
    """Of overrides, those that all trials of a search share, and what each trial takes its values from."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(lines))
    overrides = {override.get_key_element(): override for override in parsed}  # the last one counts
    fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
    space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
    if not space:
        raise UserError(
            "Nothing to search. Name it with +search=rates, or with values such as model.hidden=128,512 or "
            "'optimizer.lr=tag(log,interval(0.001,0.1))'."
        )
    return fixed, space


def values(override: Override) -> list[str]:
    """Those of a sweep that can be listed, as one writes them.

    Raises:
        UserError: there are none, too many, or it cannot be listed.
    """
    of = override.value()
    if isinstance(of, IntervalSweep):
        raise UserError(f"{override.input_line}: an interval has no end of values. Use cifarnet.search, or a list.")
    if isinstance(of, RangeSweep) and _count(override, of) > MOST:
        raise UserError(f"{override.input_line} names {_count(override, of):,} values. Give {MOST:,} or less.")
    listed = list(override.sweep_string_iterator())
    if not listed:
        raise UserError(f"{override.input_line} names no value: nothing to run.")
    return listed


def distribution(override: Override) -> "BaseDistribution":
    """Optuna's distribution for one of Hydra's sweeps: a choice, a range, or an interval with both ends included.

    Raises:
        UserError: it is empty, or cannot be what it is tagged as.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    of = override.value()
    log = _is_log(override)
    try:
        if isinstance(of, IntervalSweep):
            _finite(override, of.start, of.end)
            whole = isinstance(of.start, int) and isinstance(of.end, int)
            return (IntDistribution if whole else FloatDistribution)(of.start, of.end, log=log)
        if isinstance(of, RangeSweep):
            last = Decimal(str(of.start)) + (_count(override, of) - 1) * Decimal(str(of.step))
            whole = all(isinstance(number, int) for number in (of.start, of.stop, of.step))
            kind, number = (IntDistribution, int) if whole else (FloatDistribution, float)
            ends = sorted((number(of.start), number(last)))
            return kind(*ends, step=abs(of.step), log=log)
    except ValueError as error:  # Optuna's
        raise UserError(f"{override.input_line}: {' '.join(str(error).split())}") from error
    return CategoricalDistribution(values(override))


def _is_log(override: Override) -> bool:
    """Is it tagged so? No other tag means anything."""
    tags = getattr(override.value(), "tags", set())
    if tags - {"log"} or (tags and isinstance(override.value(), ChoiceSweep)):
        raise UserError(
            f"{override.input_line}: only intervals and ranges have a tag, and only log is one, as in "
            "tag(log,interval(0.001,0.1))."
        )
    return bool(tags)


def _count(override: Override, of: RangeSweep) -> int:
    """How many values a range has: at least one."""
    assert of.start is not None
    assert of.stop is not None
    _finite(override, of.start, of.stop, of.step)
    start, stop, step = (Decimal(str(number)) for number in (of.start, of.stop, of.step))
    count = math.ceil((stop - start) / step) if step else 0
    if count < 1:
        raise UserError(f"{override.input_line} names no value: nothing to run.")
    return count


def _finite(override: Override, *numbers: float | None) -> None:
    if not all(number is not None and abs(number) < math.inf for number in numbers):
        raise UserError(f"{override.input_line}: give finite numbers.")
