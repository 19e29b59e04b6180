"""Is a difference of two means more than luck, and how many samples would tell?"""

import math
import statistics
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

LEVEL, POWER = 0.05, 0.8  # how often luck may pass for a difference; how often a difference is to be found
MOST_SEEDS = 10_000  # where the search for their number ends


class Welch(NamedTuple):
    """A difference of two means with its 95 % confidence interval and p-value; NaN where there can be none."""

    difference: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def welch(first: Sequence[float], second: Sequence[float]) -> Welch:
    """Welch's two-sided t-test of two means, whose variances may differ.

    NaN, but for the difference, where a sample holds fewer than two values, or neither varies.

    Source: B. L. Welch, The generalization of "Student's" problem when several different population variances are
    involved, Biometrika 34 (1947).
    """
    from scipy import stats

    difference = statistics.mean(first) - statistics.mean(second)
    if min(len(first), len(second)) < 2 or not (_varies(first) or _varies(second)):
        return Welch(difference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of lost precision, where one of them does not vary
        test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval(1 - LEVEL)
    return Welch(difference, float(low), float(high), float(test.pvalue))


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % confidence interval, by Student's t; NaN for one value or equal ones."""
    from scipy import stats

    if not _varies(values):
        return math.nan
    return float(stats.t.interval(1 - LEVEL, len(values) - 1, scale=stats.sem(values))[1])


def _varies(values: Sequence[float]) -> bool:
    return len(set(values)) > 1


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for being several; NaN, a test that was not made, stays and does not count.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. Journal of Statistics 6 (1979).
    """
    corrected, largest = list(p_values), 0.0
    tested = sorted((i for i, p in enumerate(p_values) if math.isfinite(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def power(seeds: int, difference: float, deviations: tuple[float, float], level: float = LEVEL) -> float:
    """How probably Welch's test finds a true difference, not its opposite, with so many seeds in each of two groups.

    By the noncentral t distribution with Satterthwaite's degrees of freedom. Source: B. K. Moser, G. R. Stevens,
    C. L. Watts, The two-sample t test versus Satterthwaite's approximate F test, Communications in Statistics - Theory
    and Methods 18 (1989).
    """
    from scipy import stats

    variances = [deviation**2 for deviation in deviations]
    freedom = (seeds - 1) * sum(variances) ** 2 / sum(variance**2 for variance in variances)
    shift = abs(difference) / math.sqrt(sum(variances) / seeds)
    return float(stats.nct.sf(stats.t.ppf(1 - level / 2, freedom), freedom, shift))


def seeds_needed(difference: float, deviations: tuple[float, float], level: float = LEVEL) -> int | None:
    """The least number of seeds in each group with a power of 80 %, if the difference and deviations are the true ones.

    None where it is more than `MOST_SEEDS`.
    """
    numbers = range(MOST_SEEDS + 1)
    seeds = bisect_left(numbers, POWER, lo=2, key=lambda seeds: power(seeds, difference, deviations, level))
    return seeds if seeds <= MOST_SEEDS else None
