"""Tests of the difference of two means, and the number of samples that a test needs to detect it."""

import math
import statistics
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from scipy import stats

LEVEL = 0.05  # the probability of a significant result if there is no difference
POWER = 0.8  # the desired probability of a significant result if there is a difference
MOST_SEEDS = 10_000  # the largest number of seeds that is tried
ROUNDING = 1e-12  # differences of equal numbers vary by less


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Apply Welch's two-sided t-test to the means of two samples, whose variances may differ.

    Source: B. L. Welch, The generalization of "Student's" problem when several different population variances are
    involved, Biometrika 34 (1947).

    Returns:
        The low and high end of the 95% confidence interval of the difference, and the p-value; NaN if a sample has
        fewer than two values, or if neither sample varies.
    """
    if min(len(first), len(second)) < 2 or len(set(first)) == len(set(second)) == 1:
        return math.nan, math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # loss of precision if one sample does not vary
        test: Any = stats.ttest_ind(first, second, equal_var=False)
    return *test.confidence_interval(1 - LEVEL), test.pvalue


def paired(differences: Sequence[float], overlap: float) -> tuple[float, float, float]:
    """Apply the two-sided paired t-test with corrected variance to the differences of two settings on the same folds.

    The training sets of folds overlap, so that the differences are correlated. The correction multiplies their variance
    by 1/n + overlap instead of 1/n.

    Source: C. Nadeau, Y. Bengio, Inference for the generalization error, Machine Learning 52 (2003).

    Args:
        overlap: the number of validation images divided by the number of training images; 0 for independent values.

    Returns:
        The low and high end of the 95% confidence interval of the mean difference, and the p-value; NaN if there are
        fewer than two differences, or if they do not vary.
    """
    if math.isnan(width := interval(differences, overlap)):
        return math.nan, math.nan, math.nan
    mean = statistics.mean(differences)
    freedom = len(differences) - 1
    error = width / stats.t.ppf(1 - LEVEL / 2, freedom)
    return mean - width, mean + width, float(2 * stats.t.sf(abs(mean) / error, freedom))


def interval(values: Sequence[float], overlap: float = 0.0) -> float:
    """Return half the width of the 95% confidence interval of the mean (Student's t); NaN if the values do not vary.

    Args:
        overlap: see `paired`.
    """
    if len(values) < 2 or (deviation := statistics.stdev(values)) < ROUNDING:
        return math.nan
    scale = deviation * math.sqrt(1 / len(values) + overlap)
    return float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * scale)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple comparisons. NaN, for a test that was not made, remains NaN and is not counted.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. Journal of Statistics 6 (1979).
    """
    corrected, largest = list(p_values), 0.0
    tested = sorted((i for i, p in enumerate(p_values) if math.isfinite(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def power(seeds: int, difference: float, deviations: tuple[float, float], level: float = LEVEL) -> float:
    """Return the probability that Welch's test detects a true difference with the correct sign.

    It is computed from the noncentral t distribution with Satterthwaite's degrees of freedom.

    Source: B. K. Moser, G. R. Stevens, C. L. Watts, The two-sample t test versus Satterthwaite's approximate F test,
    Communications in Statistics - Theory and Methods 18 (1989).

    Args:
        seeds: the number of seeds in each of the two groups.
        difference: the difference of the true means.
        deviations: the true standard deviations.
    """
    variances = [deviation**2 for deviation in deviations]
    freedom = (seeds - 1) * sum(variances) ** 2 / sum(variance**2 for variance in variances)
    shift = abs(difference) / math.sqrt(sum(variances) / seeds)
    return float(stats.nct.sf(stats.t.ppf(1 - level / 2, freedom), freedom, shift))


def seeds_needed(difference: float, deviations: tuple[float, float], level: float = LEVEL) -> int:
    """Return the smallest number of seeds per group with a `power` of at least `POWER`; above `MOST_SEEDS` if none."""
    numbers = range(MOST_SEEDS + 1)
    return bisect_left(numbers, POWER, lo=2, key=lambda seeds: power(seeds, difference, deviations, level))
