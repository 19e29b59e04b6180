import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional import classification

from cifarnet.evaluation import metrics

# four images of three classes, probabilities of which the highest are 0.8, 0.8, 0.5, 0.9
PROBABILITIES = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.05, 0.05, 0.9]])
LABELS = torch.tensor([0, 2, 1, 2])  # the second is a mistake


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z² / (n + z²), z = 1.95996
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (8470, 10_000, 0.83981, 0.85392),
    ],
)
def test_wilson_interval_by_hand(correct, count, low, high):
    assert metrics.proportion(correct, count)["interval"] == pytest.approx([low, high], abs=1e-5)


def test_no_images_have_no_interval():
    assert all(map(math.isnan, metrics.proportion(0, 0)["interval"]))


def test_wilson_interval_has_its_coverage():
    correct = torch.distributions.Binomial(50, torch.tensor(0.9))
    torch.manual_seed(0)
    intervals = [metrics.proportion(int(drawn), 50)["interval"] for drawn in correct.sample((4000,))]
    assert sum(low <= 0.9 <= high for low, high in intervals) / 4000 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(("lost", "gained", "count"), [(0, 0, 10), (3, 1, 60), (52, 37, 10_000), (10, 0, 10)])
def test_paired_interval_by_hand(lost, gained, count):
    """It is the interval of a weighted mean: each image has the weight 1, and each cell of the table 1/2 more."""
    both_wrong = count - lost - gained
    before = torch.tensor([True] * lost + [False] * gained + [False] * both_wrong)
    after = torch.tensor([False] * lost + [True] * gained + [False] * both_wrong)
    changes = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    weighted = [*((change, 1.0) for change in changes), (1, 0.5), (-1, 0.5), (0, 0.5), (0, 0.5)]
    total = sum(weight for _, weight in weighted)
    mean = sum(change * weight for change, weight in weighted) / total
    variance = sum((change - mean) ** 2 * weight for change, weight in weighted) / total
    margin = 1.959964 * math.sqrt(variance / total)
    expected = max(-1, mean - margin), min(1, mean + margin)
    assert metrics.paired_interval(before, after) == pytest.approx(expected, abs=1e-6)


def test_paired_interval_has_its_coverage():
    """Of 200 images, the second network loses 6% and gains 2%, in expectation."""
    counts = torch.distributions.Multinomial(200, torch.tensor([0.06, 0.02, 0.8, 0.12]))
    before, after = torch.tensor([True, False, True, False]), torch.tensor([False, True, True, False])
    torch.manual_seed(0)
    intervals = [
        metrics.paired_interval(before.repeat_interleave(drawn), after.repeat_interleave(drawn))
        for drawn in counts.sample((2000,)).long()
    ]
    assert sum(low <= -0.04 <= high for low, high in intervals) / 2000 == pytest.approx(0.95, abs=0.02)


def test_calibration_by_hand():
    figures = metrics.calibration(PROBABILITIES.log(), LABELS)
    # bins of width 1/15: {0.8, 0.8} half right, {0.5} right, {0.9} right
    assert figures["calibration_error"] == pytest.approx(2 / 4 * 0.3 + 1 / 4 * 0.5 + 1 / 4 * 0.1, abs=1e-6)
    squares = [0.2**2 + 0.1**2 + 0.1**2, 0.1**2 + 0.8**2 + 0.9**2, 0.2**2 + 0.5**2 + 0.3**2, 0.05**2 + 0.05**2 + 0.1**2]
    assert figures["brier"] == pytest.approx(sum(squares) / 4)
    cross_entropy = -sum(math.log(p) for p in (0.8, 0.1, 0.5, 0.9)) / 4
    assert figures["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-6)
    one_image = metrics.calibration(PROBABILITIES[:1].log(), LABELS[:1])
    assert one_image["brier"] == pytest.approx(squares[0])


def test_bins_by_hand():
    rows = metrics.bins(PROBABILITIES[2:].log(), LABELS[2:])
    assert [row["images"] for row in rows] == [*[0] * 7, 1, *[0] * 5, 1, 0]  # of width 1/15: 0.5 and 0.9
    for row in rows:
        assert math.isnan(row["confidence"]) == math.isnan(row["accuracy"]) == (row["images"] == 0)


def test_confidence_of_one_belongs_to_the_last_bin():
    """A correct prediction with confidence 0.96 and a wrong one with 1 share a bin."""
    logits = torch.tensor([[math.log(0.96), math.log(0.04)], [100.0, 0.0]])
    labels = torch.tensor([0, 1])
    assert metrics.calibration(logits, labels)["calibration_error"] == pytest.approx(0.48, abs=1e-6)
    last = metrics.bins(logits, labels)[-1]
    assert (last["images"], last["accuracy"]) == (2, 0.5)
    assert last["confidence"] == pytest.approx(0.98)


def test_bins_give_the_calibration_error():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 10), torch.randint(0, 10, (500,))
    rows = [row for row in metrics.bins(logits, labels, temperature=2.0) if row["images"]]
    assert sum(row["images"] for row in rows) == 500
    assert all(row["from"] <= row["confidence"] <= row["to"] for row in rows)
    error = sum(row["images"] / 500 * abs(row["accuracy"] - row["confidence"]) for row in rows)
    assert error == pytest.approx(metrics.calibration(logits, labels, 2.0)["calibration_error"], abs=1e-6)


def test_calibration_error_has_15_bins():
    random = torch.Generator().manual_seed(1)
    logits, labels = 2 * torch.randn(300, 4, generator=random), torch.randint(0, 4, (300,), generator=random)
    confidence, predicted = logits.double().softmax(1).max(1)
    right, error = (predicted == labels).double(), 0.0
    for i in range(15):
        inside = (i / 15 < confidence) & (confidence <= (i + 1) / 15)
        error += (right[inside] - confidence[inside]).sum().abs().item() / 300
    assert metrics.calibration(logits, labels)["calibration_error"] == pytest.approx(error, abs=1e-6)
    edges = [(row["from"], row["to"]) for row in metrics.bins(logits, labels)]
    assert edges == [(i / 15, (i + 1) / 15) for i in range(15)]


def test_temperature_minimises_the_cross_entropy():
    torch.manual_seed(0)
    calibrated = torch.randn(10_000, 5, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=calibrated).sample()
    for factor in (0.4, 1.0, 3.0):
        fitted = metrics.fit_temperature(factor * calibrated, labels)
        assert fitted == pytest.approx(factor, rel=0.05)
        losses = [F.cross_entropy(factor * calibrated / (fitted * step), labels) for step in (0.99, 1, 1.01)]
        assert min(losses) == losses[1]
        slope, step = 0.0, 1e-4
        for sign in (1, -1):
            slope += sign * F.cross_entropy(factor * calibrated / (fitted * (1 + sign * step)), labels).item()
        assert abs(slope / (2 * step)) < 1e-6
    after = metrics.calibration(3 * calibrated, labels, metrics.fit_temperature(3 * calibrated, labels))
    assert after["calibration_error"] < 0.02 < metrics.calibration(3 * calibrated, labels)["calibration_error"]


def test_temperature_by_hand():
    """Four predictions have odds of e, and three are right: the odds are 3 at a temperature of 1 / log(3)."""
    logits = torch.tensor([[1.0, 0.0]] * 4)
    fitted = metrics.fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    assert fitted == pytest.approx(1 / math.log(3), rel=1e-7)


def test_temperature_stays_within_its_limits():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert metrics.fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(0.05, rel=1e-4)  # all right
    assert metrics.fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(20, rel=1e-4)  # all wrong


def test_summary():
    probabilities = torch.cat([PROBABILITIES, torch.tensor([[0.1, 0.2, 0.7]])])
    labels = torch.tensor([0, 1, 2, 2, 0])  # ranks of the true classes: 1, 1, 2, 1, 3
    figures = metrics.summary(probabilities.log(), labels)
    assert figures["accuracy"] == metrics.accuracy(probabilities, labels) == 0.6
    assert figures["top2_accuracy"] == pytest.approx(0.8)
    assert figures["interval"] == metrics.proportion(3, 5)["interval"]


def test_classes_without_images_have_no_accuracy():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]])
    rows = metrics.by_class(confusion, ["a", "b", "c"])
    assert [(row["name"], row["images"]) for row in rows] == [("a", 4), ("b", 0), ("c", 2)]
    assert rows[0]["accuracy"] == 0.75
    assert math.isnan(rows[1]["accuracy"])
    assert (rows[1]["precision"], rows[1]["f1"]) == (0, 0)  # one image is mistaken for this class


def test_precision_and_f1_against_torchmetrics():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (300,), generator=random)
    predicted = torch.where(torch.rand(300, generator=random) < 0.6, labels, labels * 2 % 5)
    confusion = classification.multiclass_confusion_matrix(predicted, labels, 5)
    rows = metrics.by_class(confusion, list("abcde"))
    for key, function in {
        "accuracy": classification.multiclass_recall,
        "precision": classification.multiclass_precision,
        "f1": classification.multiclass_f1_score,
    }.items():
        expected = function(predicted, labels, 5, average="none").tolist()
        assert [row[key] for row in rows] == pytest.approx(expected)
        assert len({round(value, 3) for value in expected}) > 2


def test_intervals_of_a_class_by_hand():
    """Of 10 images, 8 are recognized; 5 others are mistaken for the class: recall 8/10, precision 8/13, F* 8/15."""
    row, _ = metrics.by_class(torch.tensor([[8, 2], [5, 85]]), ["a", "b"])
    assert row["interval"] == metrics.proportion(8, 10)["interval"]
    assert (row["predicted"], row["precision"], row["f1"]) == (13, 8 / 13, pytest.approx(16 / 23))
    assert row["precision_interval"] == metrics.proportion(8, 13)["interval"]
    low, high = metrics.proportion(8, 15)["interval"]
    assert row["f1_interval"] == pytest.approx([2 * low / (1 + low), 2 * high / (1 + high)])


def test_classes_without_images_and_predictions_have_no_f1():
    row = metrics.by_class(torch.tensor([[3, 0, 1], [0, 0, 0], [1, 0, 2]]), ["a", "b", "c"])[1]
    assert all(map(math.isnan, (row["precision"], *row["precision_interval"], row["f1"], *row["f1_interval"])))


def test_interval_of_f1_has_its_coverage():
    """The F1 of a class is 2 TP / (2 TP + FP + FN)."""
    cells = torch.tensor([0.2, 0.05, 0.1, 0.65])  # TP, FN, FP and TN as shares of all images
    expected = 2 * 0.2 / (2 * 0.2 + 0.05 + 0.1)
    torch.manual_seed(0)
    drawn = torch.distributions.Multinomial(100, cells).sample((1000,)).long()
    intervals = [metrics.by_class(confusion.reshape(2, 2), ["a", "b"])[0]["f1_interval"] for confusion in drawn]
    assert sum(low <= expected <= high for low, high in intervals) / 1000 == pytest.approx(0.95, abs=0.02)


def test_against_humans_by_hand():
    humans = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    figures = metrics.against_humans(PROBABILITIES[:2].log(), humans, temperature=0.5)
    expected = -(0.5 * math.log(0.8) + 0.5 * math.log(0.1) + math.log(0.1)) / 2
    assert figures["cross_entropy"] == pytest.approx(expected, abs=1e-6)
    squares = 0.8**2 + 0.1**2 + 0.1**2  # the temperature squares the probabilities, which are then normalised
    expected = 2 * expected + math.log(squares)
    assert figures["cross_entropy_with_temperature"] == pytest.approx(expected, abs=1e-6)
    assert figures["entropy"] == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("num_classes", [20, 21])
def test_top5_accuracy_of_many_classes(num_classes):
    logits = torch.randn(200, num_classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % num_classes
    ranked = logits.argsort(1, descending=True).tolist()
    expected = sum(label in row[:5] for row, label in zip(ranked, labels.tolist(), strict=True)) / 200
    found = metrics.summary(logits, labels).get("top5_accuracy")
    assert found is None if num_classes == 20 else found == pytest.approx(expected)
