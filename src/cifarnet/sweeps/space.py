"""The values of a sweep and the space of a search, parsed from Hydra's notation: `tag(log,interval(0.001,0.1))`."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from cifarnet.errors import UserError, reason

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST = 10_000  # the largest number of jobs in a sweep


def search_space(lines: Sequence[str], loader: ConfigLoader) -> "tuple[list[str], dict[str, BaseDistribution]]":
    """Split overrides into those that all trials share, and a distribution for each setting that is searched."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(lines))
    overrides = {override.get_key_element(): override for override in parsed}  # the last one takes effect
    fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
    space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
    if not space:
        problem, interval = "The search space is empty", "'optimizer.lr=tag(log,interval(0.001,0.1))'"
        raise UserError(f"{problem}. Add +search=rates, or values such as model.hidden=128,512 or {interval}.")
    for key in {key.lstrip("+") for key in space} & {"data.fold", "data.folds", "data.split_seed"}:
        raise UserError(f"{key}: a search would choose the easiest validation images. Set {key} to one value.")
    return fixed, space


def values(override: Override) -> list[str]:
    """Return the values of a sweep, as they are written in overrides.

    Raises:
        UserError: the sweep has no values, too many, or infinitely many.
    """
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        raise UserError(f"{override.input_line} has infinitely many values. Use cifarnet.search, or a list.")
    if isinstance(sweep, RangeSweep) and (count := _bounds(override, sweep)[2]) > MOST:
        raise UserError(f"{override.input_line} has {count:,} values. Use {MOST:,} or fewer.")
    listed = list(override.sweep_string_iterator())
    if not listed:
        raise UserError(f"{override.input_line} has no values. Specify at least one.")
    return listed


def distribution(override: Override) -> "BaseDistribution":
    """Return Optuna's distribution for a choice, a range, or an interval, which includes both ends.

    Raises:
        UserError: it has no values, or has a tag that cannot be used.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    tags = getattr(sweep, "tags", set())
    if tags - {"log"} or (tags and isinstance(sweep, ChoiceSweep)):
        raise UserError(f"{override.input_line}: the only supported tag is log, on intervals and ranges. Correct it.")
    if not isinstance(sweep, IntervalSweep | RangeSweep):
        return CategoricalDistribution(values(override))
    numbers = [sweep.start, sweep.end] if isinstance(sweep, IntervalSweep) else [sweep.start, sweep.stop, sweep.step]
    is_whole = all(isinstance(number, int) for number in numbers)
    low, high, _ = _bounds(override, sweep)
    step = abs(sweep.step) if isinstance(sweep, RangeSweep) else None
    try:
        if is_whole:
            return IntDistribution(int(low), int(high), bool(tags), int(step or 1))
        return FloatDistribution(float(low), float(high), bool(tags), step)
    except ArithmeticError as error:
        raise UserError(f"{override.input_line} has too many values. Use a larger step.") from error
    except ValueError as error:
        raise UserError(f"{override.input_line}: {reason(error)}.") from error


def _bounds(override: Override, sweep: IntervalSweep | RangeSweep) -> tuple[Decimal, Decimal, float]:
    """Return the lowest and the highest value of an interval or a range, and the number of values."""
    is_range = isinstance(sweep, RangeSweep)
    numbers = [sweep.start, sweep.stop, sweep.step] if is_range else [sweep.start, sweep.end]
    start, end, *steps = (Decimal(str(number)) for number in numbers)
    if not all(number.is_finite() and abs(number) < 2**63 for number in (start, end, *steps)):
        raise UserError(f"{override.input_line}: use finite numbers below 2**63.")
    if not is_range:
        return start, end, math.inf
    step = steps[0]
    count = math.ceil((end - start) / step) if step else 0
    if count < 1:
        raise UserError(f"{override.input_line} has no values. Specify at least one.")
    low, high = sorted((start, start + (count - 1) * step))
    return low, high, count
