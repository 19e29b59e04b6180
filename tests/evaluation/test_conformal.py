import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import betabinom, binom
from test_selective import random_predictions, subject

from cifarnet.evaluation import conformal, metrics

METHODS = ("LAC", "APS", "RAPS")


def true_scores(logits, labels, method, seed=0, kind="val"):
    return conformal.scores(logits, seed, kind)[method].gather(1, labels[:, None]).flatten()


def test_scores_against_a_loop():
    logits, _ = random_predictions(count=60)
    found = conformal.scores(logits, 0, "test")
    fractions = []
    for i, probabilities in enumerate(logits.double().softmax(1).tolist()):
        top = probabilities.index(max(probabilities))
        fractions.append(found["APS"][i, top].item() / probabilities[top])
        for label, probability in enumerate(probabilities):
            more_probable = [other for other in probabilities if other > probability]
            aps = sum(more_probable) + fractions[-1] * probability
            rank = 1 + len(more_probable)
            expected = {"LAC": 1 - probability, "APS": aps, "RAPS": aps + 0.1 * max(0, rank - 2)}
            assert {method: found[method][i, label].item() for method in METHODS} == pytest.approx(expected)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert min(fractions) < 0.2 < 0.8 < max(fractions)
    assert sum(fractions) / 60 == pytest.approx(0.5, abs=0.15)


def test_random_fractions_follow_the_seed():
    logits = random_predictions(count=20)[0]
    first, again = conformal.scores(logits, 0, "test"), conformal.scores(logits, 0, "test")
    for other in (conformal.scores(logits, 1, "test"), conformal.scores(logits, 0, "val")):
        for method in METHODS:
            assert torch.equal(first[method], again[method])
            assert torch.equal(first[method], other[method]) == (method == "LAC")


@pytest.mark.parametrize("alpha", ["0.01", "0.05", "0.1", "0.29", "0.3", "0.5", "0.7", "0.999"])
def test_threshold_has_the_published_rank(alpha):
    for count in range(1, 130):
        scores = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        rank = math.ceil((count + 1) * (1 - Fraction(alpha)))
        expected = sorted(scores.tolist())[rank - 1] if rank <= count else math.inf
        assert conformal.threshold(scores, float(alpha)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_coverage_over_random_splits(method):
    """Of m test images, BetaBinomial(m, k, n + 1 - k) are covered, where k is the rank of the threshold among n."""
    n, m, alpha, splits = 30, 500, 0.1, 100
    rank = math.ceil((n + 1) * (1 - alpha))
    expected = betabinom(m, rank, n + 1 - rank)
    logits, labels = random_predictions(count=n + m)
    covered = []
    for split in range(splits):
        order = torch.randperm(n + m, generator=torch.Generator().manual_seed(split))
        val, test = order[:n], order[n:]
        limit = conformal.threshold(true_scores(logits[val], labels[val], method, split), alpha)
        covered.append(int((true_scores(logits[test], labels[test], method, split, "test") <= limit).sum()))
    low, high = expected.ppf([0.025, 0.975])
    assert sum(not low <= count <= high for count in covered) <= binom.ppf(0.999, splits, 0.05)
    # without the finite-sample correction, the mean would be 27 / 31 and not 28 / 31: 6 standard errors less
    assert abs(sum(covered) / splits - expected.mean()) < 3 * expected.std() / math.sqrt(splits)


def test_section_on_validation_and_test_images():
    (val_logits, val_labels), (logits, labels) = random_predictions(400, seed=1), random_predictions(600, seed=2)
    record, drawn = conformal.section(subject(logits, labels, (val_logits, val_labels), alpha=0.2, seed=3))
    assert (record["alpha"], record["val_images"], drawn, list(record["sets"])) == (0.2, 400, {}, list(METHODS))
    for method, found in record["sets"].items():
        limit = sorted(true_scores(val_logits, val_labels, method, 3).tolist())[math.ceil(401 * 0.8) - 1]
        assert found["threshold"] == limit
        inside = [[score <= limit for score in row] for row in conformal.scores(logits, 3, "test")[method].tolist()]
        sizes, covered = [sum(row) for row in inside], [row[i] for row, i in zip(inside, labels.tolist(), strict=True)]
        assert found["coverage"] == pytest.approx(sum(covered) / 600)
        assert found["interval"] == metrics.proportion(sum(covered), 600)["interval"]
        assert found["mean_size"] == pytest.approx(sum(sizes) / 600)
        assert found["sizes"] == [sizes.count(size) for size in range(11)]
        for i, row in enumerate(found["classes"]):
            of_class = [place for place, label in enumerate(labels.tolist()) if label == i]
            assert (row["name"], row["images"]) == (f"class {i}", len(of_class))
            assert row["coverage"] == pytest.approx(sum(covered[place] for place in of_class) / len(of_class))
            assert row["mean_size"] == pytest.approx(sum(sizes[place] for place in of_class) / len(of_class))
    sizes = [found["mean_size"] for found in record["sets"].values()]
    assert sizes[0] < sizes[2] < sizes[1]  # LAC has the smallest sets on average, and RAPS smaller ones than APS


def test_without_validation_images():
    assert conformal.section(subject(*random_predictions(10), alpha=0.1, seed=0)) == (None, {})


def test_too_few_validation_images_give_sets_of_all_classes():
    val = random_predictions(8)
    record, _ = conformal.section(subject(*random_predictions(50), val, alpha=0.1, seed=0))
    for found in record["sets"].values():
        assert (found["threshold"], found["coverage"], found["mean_size"]) == (math.inf, 1, 10)


def test_classes_without_test_images():
    logits, labels = random_predictions(50)
    record, _ = conformal.section(subject(logits, labels.clamp_max(8), (logits, labels), alpha=0.1, seed=0))
    row = record["sets"]["LAC"]["classes"][9]
    assert row["images"] == 0
    assert math.isnan(row["coverage"])
    assert math.isnan(row["mean_size"])
