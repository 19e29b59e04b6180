from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cifarnet.evaluation import figures, metrics, selective
from cifarnet.evaluation.subject import Subject
from cifarnet.inference.predictor import Predictions


def subject(logits, labels, val=None, **config):
    """Return what a section needs to know about logits [N, num_classes] and labels [N]; `val` is such a pair."""
    pairs = (logits, labels), val
    parts = [Predictions(pair[0], *pair, torch.arange(len(pair[1]))) if pair else None for pair in pairs]
    data = SimpleNamespace(class_names=[f"class {i}" for i in range(logits.shape[1])])
    return Subject(None, data, None, SimpleNamespace(**config), *parts)


def random_predictions(count=500, num_classes=10, seed=0):
    torch.manual_seed(seed)
    logits = 2 * torch.randn(count, num_classes)
    return logits, torch.distributions.Categorical(logits=1.2 * logits).sample()


def risks(confidence, wrong):
    """Return the fraction of mistakes among the k most confident images, for each k."""
    order = sorted(range(len(wrong)), key=lambda i: -confidence[i])
    found, mistakes = [], 0
    for k, i in enumerate(order, 1):
        mistakes += int(wrong[i])
        found.append(mistakes / k)
    return found


def test_aurc_against_a_loop():
    logits, labels = random_predictions()
    confidence, wrong = logits.double().softmax(1).amax(1).tolist(), (logits.argmax(1) != labels).tolist()
    record, drawn = selective.section(subject(logits, labels))
    expected, best = risks(confidence, wrong), risks([not mistake for mistake in wrong], wrong)
    assert 0.2 < np.mean(wrong) < 0.8
    assert record["aurc"] == pytest.approx(np.mean(expected))
    assert record["excess_aurc"] == pytest.approx(np.mean(expected) - np.mean(best))
    assert record["excess_aurc"] > 0
    curve, optimum = drawn["selective"].axes[0].lines
    np.testing.assert_allclose(curve.get_xydata().T, [np.arange(1, 501) / 500, expected])
    np.testing.assert_allclose(optimum.get_ydata(), best)


def test_accuracy_at_each_coverage():
    logits, labels = random_predictions()
    record, _ = selective.section(subject(logits, labels))
    confidence, predicted = logits.double().softmax(1).max(1)
    order = confidence.argsort(descending=True)
    assert [row["images"] for row in record["coverages"]] == [250, 400, 450, 475, 500]
    for row in record["coverages"]:
        first = order[: row["images"]]
        correct = int((predicted[first] == labels[first]).sum())
        expected = metrics.proportion(correct, len(first))
        assert {key: row[key] for key in expected} == expected
        assert row["coverage"] == len(first) / 500
        assert row["confidence"] == confidence[first].min().item()
    accuracies = [row["accuracy"] for row in record["coverages"]]
    assert accuracies[-1] == metrics.accuracy(logits, labels) < accuracies[0]


def test_a_perfect_network_has_no_risk():
    logits = torch.eye(3)[torch.arange(9) % 3]
    record, _ = selective.section(subject(logits, torch.arange(9) % 3))
    assert record["aurc"] == record["excess_aurc"] == 0


def test_one_image():
    record, _ = selective.section(subject(torch.tensor([[1.0, 0.0]]), torch.tensor([1])))
    assert [row["images"] for row in record["coverages"]] == [1] * 5
    assert (record["aurc"], record["excess_aurc"]) == (1, 0)


def test_figure():
    figure = figures.risk_coverage(np.array([0.0, 0.5]), np.array([0.0, 0.25]), "AURC 0.25")
    (axis,) = figure.axes
    assert axis.get_title() == "AURC 0.25"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "most confident images first",
        "best possible order",
    ]
