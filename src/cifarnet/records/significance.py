"""Is a difference of two means more than luck, and how many samples would tell?"""

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence

from scipy import stats

LEVEL, POWER = 0.05, 0.8  # how often luck may pass for a difference; how often a difference is to be found
MOST_SEEDS = 10_000  # where the search for their number ends


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Welch's two-sided t-test of two means, whose variances may differ: low and high end of their difference's 95 %
    confidence interval, and the p-value; NaN where a sample holds fewer than two values, or neither varies.

    Source: B. L. Welch, The generalization of "Student's" problem when several different population variances are
    involved, Biometrika 34 (1947).
    """
    if min(len(first), len(second)) < 2 or len(set(first)) == len(set(second)) == 1:
        return math.nan, math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of lost precision, where one of them does not vary
        test = stats.ttest_ind(first, second, equal_var=False)
    return *test.confidence_interval(1 - LEVEL), test.pvalue


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % confidence interval, by Student's t; NaN for one value or equal ones."""
    if len(set(values)) == 1:
        return math.nan
    return float(stats.t.interval(1 - LEVEL, len(values) - 1, scale=stats.sem(values))[1])


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
