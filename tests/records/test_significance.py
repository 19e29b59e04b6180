import math

import numpy as np
import pytest
from scipy import stats

from cifarnet.records import significance
from cifarnet.records.significance import holm, interval, paired, power, seeds_needed, welch


def two_tails(t: float, freedom: float) -> float:
    """P(|T| > t) for Student's t, by Simpson's rule over its density."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(math.pi * freedom)
    steps = 2000
    density = [scale * (1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    weights = [1, *([4, 2] * (steps // 2 - 1)), 4, 1]
    return 1 - 2 * sum(w * d for w, d in zip(weights, density, strict=True)) * t / steps / 3


def test_welch_equals_a_calculation_by_hand():
    # means 3 and 5; variances 10/4 = 2.5 and 20/3; 2.5/5 = 0.5 and 20/3/4 = 1.66667; error √2.166667 = 1.471960;
    # t = -2/1.471960 = -1.358732; freedom 2.166667² / (0.5²/4 + 1.666667²/3) = 4.694444/0.988426 = 4.749415
    error, t, freedom = 1.471960, 1.358732, 4.749415
    low, high, p = welch([1, 2, 3, 4, 5], [2, 4, 6, 8])
    assert p == pytest.approx(two_tails(t, freedom), abs=1e-5)
    assert low + high == pytest.approx(-4)
    assert two_tails((high + 2) / error, freedom) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize(("first", "second"), [([0.9], [0.8, 0.7]), ([0.9, 0.9, 0.9], [0.8, 0.8]), ([0.1], [0.1])])
def test_welch_is_nan_without_variation(first, second):
    assert all(map(math.isnan, welch(first, second)))


@pytest.mark.filterwarnings("error")
def test_welch_with_one_constant_sample():
    _, _, p = welch([0.9, 0.9, 0.9], [0.8, 0.7])  # error = deviation/√2 = 0.05, one degree of freedom: arctan
    assert p == pytest.approx(1 - 2 / math.pi * math.atan(0.15 / 0.05))


def test_the_corrected_paired_test_equals_a_calculation_by_hand():
    # mean 0.016; squares of the deviations 16 + 36 + 196 + 256 + 16 = 520 (× 1e-6), variance 520/4 = 130;
    # error √((1/5 + 1/4) × 130e-6) = 0.0076485; t = 0.016 / 0.0076485 = 2.09191, 4 degrees of freedom
    differences = [0.02, 0.01, 0.03, 0.00, 0.02]
    low, high, p = paired(differences, 1 / 4)  # 10,000 images for validation, 40,000 for training
    assert p == pytest.approx(two_tails(2.09191, 4), abs=1e-5)
    assert low + high == pytest.approx(0.032)
    assert two_tails((high - 0.016) / 0.0076485, 4) == pytest.approx(0.05, abs=1e-5)
    assert paired(differences, 0)[2] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)  # without correction
    assert paired(differences, 0)[2] < 0.05 < p
    assert all(map(math.isnan, paired([0.01, 0.01], 1 / 4)))
    assert 0.92 - 0.90 != 0.12 - 0.10  # except for rounding
    assert all(map(math.isnan, paired([0.92 - 0.90, 0.12 - 0.10], 1 / 4)))
    assert all(map(math.isnan, paired([], 0)))


def test_holm_equals_a_textbook_example():
    # 4 × 0.005, 3 × 0.01, 2 × 0.03, then 0.04, which may not fall below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    one, missing = holm([0.04, math.nan])
    assert one == 0.04
    assert math.isnan(missing)


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26)])
def test_seeds_needed_equals_cohens_tables(effect, seeds):
    """J. Cohen, Statistical Power Analysis: small, medium and large effects, 80% power, 5%, two-sided."""
    assert seeds_needed(effect, (1, 1)) == seeds
    assert seeds_needed(-effect / 100, (0.01, 0.01)) == seeds


def share_of_detections(seeds, difference, deviations, equal_var=False):
    """How often 20,000 simulated tests are significant. The standard error is at most √(0.25 / 20,000) = 0.004."""
    rng = np.random.default_rng(0)
    groups = (rng.normal(mean, by, (20_000, seeds)) for mean, by in zip((difference, 0), deviations, strict=True))
    return (stats.ttest_ind(*groups, axis=1, equal_var=equal_var).pvalue < 0.05).mean()


def test_seeds_needed_for_different_deviations_equals_a_simulation():
    seeds = seeds_needed(1.0, (0.5, 1.5))
    assert power(seeds - 1, 1.0, (0.5, 1.5)) < 0.8
    assert share_of_detections(seeds, 1.0, (0.5, 1.5)) == pytest.approx(power(seeds, 1.0, (0.5, 1.5)), abs=0.01)


def test_power_of_few_seeds_equals_a_simulation():
    """With equal deviations, the degrees of freedom in the formula are those of Student's test."""
    assert share_of_detections(4, 2.0, (1, 1), equal_var=True) == pytest.approx(power(4, 2.0, (1, 1)), abs=0.012)


def test_seeds_needed_at_another_level():
    """Cohen's tables: a medium effect, 80% power, 1%, two-sided."""
    assert seeds_needed(0.5, (1, 1), level=0.01) == 96


@pytest.mark.parametrize(("most", "seeds"), [(64, 64), (63, 64), (40, 41)])
def test_the_search_for_seeds_ends_above_the_maximum(monkeypatch, most, seeds):
    monkeypatch.setattr(significance, "MOST_SEEDS", most)
    assert seeds_needed(0.5, (1, 1)) == seeds


def test_seeds_needed_for_tiny_and_huge_differences():
    assert seeds_needed(1e-6, (1, 1)) > significance.MOST_SEEDS
    assert seeds_needed(0, (1, 1)) > significance.MOST_SEEDS
    assert seeds_needed(100, (1, 1)) == 2


def test_interval_of_the_mean():
    # deviation √2, t of one degree of freedom at 97.5%: tan(0.475 π) = 12.7062; × √2/√2
    assert interval([1, 3]) == pytest.approx(math.tan(0.475 * math.pi))
    assert interval([1, 5]) == pytest.approx(2 * math.tan(0.475 * math.pi))
    assert math.isnan(interval([1]))
    assert math.isnan(interval([1, 1]))
