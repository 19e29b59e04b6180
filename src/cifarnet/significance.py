"""Is a difference of two means more than luck, and how many samples would tell?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL, POWER = 0.05, 0.8  # how often luck may pass for a difference; how often a difference is to be found
MOST_SEEDS = 10_000  # where the search for their number ends


@dataclass
class Welch:
    """A difference of two means with its 95 % confidence interval and p-value; NaN where there can be none."""

    difference: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def welch(first: Sequence[float], second: Sequence[float]) -> Welch:
    """Welch's two-sided t-test of two means, whose variances may differ.

    NaN, but for the difference, where a sample holds fewer than two values, or neither varies.

    Sources: B. L. Welch, The generalization of "Student's" problem when several different population variances are
    involved, Biometrika 34 (1947); degrees of freedom: F. E. Satterthwaite, An approximate distribution of estimates of
    variance components, Biometrics Bulletin 2 (1946).
    """
    from scipy import stats

    difference = statistics.mean(first) - statistics.mean(second)
    if min(len(first), len(second)) < 2:
        return Welch(difference)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Welch(difference)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (first, second), strict=True))
    margin = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    return Welch(difference, difference - margin, difference + margin, p)


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
    """How probably Welch's test finds a true difference, with so many seeds in each of two groups: from 0 to 1.

    By the noncentral t distribution with Satterthwaite's degrees of freedom. Source: B. K. Moser, G. R. Stevens,
    C. L. Watts, The two-sample t test versus Satterthwaite's approximate F test, Communications in Statistics - Theory
    and Methods 18 (1989).
    """
    from scipy import stats

    variances = [deviation**2 for deviation in deviations]
    freedom = (seeds - 1) * sum(variances) ** 2 / sum(variance**2 for variance in variances)
    shift = abs(difference) / math.sqrt(sum(variances) / seeds)
    limit = stats.t.ppf(1 - level / 2, freedom)
    return float(stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift))


def seeds_needed(difference: float, deviations: tuple[float, float], level: float = LEVEL) -> int | None:
    """The least number of seeds in each group with a power of 80 %, if the difference and deviations are the true ones.

    None where it is more than `MOST_SEEDS`.
    """
    low, high = 1, 2  # too few; perhaps enough
    while power(high, difference, deviations, level) < POWER:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, deviations, level) >= POWER else (middle, high)
    return high if high <= MOST_SEEDS else None


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % confidence interval, by Student's t; NaN for one value."""
    from scipy import stats

    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
