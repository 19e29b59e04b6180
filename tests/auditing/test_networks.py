"""Out-of-fold probabilities and near-duplicates, compared with loops over the images."""

import math

import numpy as np
import pytest
import torch

from cifarnet.auditing import networks
from cifarnet.auditing.scores import Scored
from cifarnet.data import Split
from cifarnet.inference.predictor import Predictor
from conftest import CustomNetwork

COUNT, CLASSES = 24, 3


def table(run: int) -> torch.Tensor:
    return torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(run))


def predictor(run: int):
    """Return a network whose logits depend on the number that an image shows."""
    return lambda images: (table(run)[images[:, 0, 0, 0].long()], None)


@pytest.fixture
def scored():
    given = np.arange(COUNT) % CLASSES
    return Scored(np.arange(COUNT), given, given, {"negative_aum": np.zeros(COUNT)}, 1)


@pytest.fixture
def train():
    return Split(torch.arange(COUNT).repeat(3, 2, 2, 1).permute(3, 0, 1, 2).to(torch.uint8), torch.zeros(COUNT).long())


def trained_on(*index) -> dict[str, np.ndarray]:
    return {"index": np.array(index), "class_names": np.array(list("abc"))}


def test_out_of_fold_probabilities_are_those_of_a_loop(scored, train):
    pytest.importorskip("cleanlab")
    folds = [[i for i in range(COUNT) if i % 3 != fold] for fold in range(3)]
    folds.append([i for i in range(COUNT) if i % 2])  # even images are classified by two networks
    folds.append(list(range(COUNT)))
    runs = [trained_on(*fold) for fold in folds]
    found = networks.confident_learning(scored, runs, map(predictor, range(5)), train)
    for image in range(COUNT):
        rows = [table(run)[image].tolist() for run, fold in enumerate(folds) if image not in fold]
        assert len(rows) == 1 + (image % 2 == 0)
        softmax = [[math.exp(logit) / sum(map(math.exp, row)) for logit in row] for row in rows]
        expected = [sum(column) / len(rows) for column in zip(*softmax, strict=True)]
        assert found[image].tolist() == pytest.approx(expected, rel=1e-6)
        label = image % CLASSES
        assert scored.values["out_of_fold"][image] == pytest.approx(1 - expected[label], rel=1e-6)
        best = max(range(CLASSES), key=lambda guess: -1 if guess == label else expected[guess])
        assert scored.suggested[image] == best
    assert scored.order == "out_of_fold"


def test_without_all_folds_nothing_is_predicted(scored, train):
    runs = [trained_on(*range(COUNT)), trained_on(*range(5, COUNT))]
    assert networks.confident_learning(scored, runs, [], train) is None
    assert (scored.order, scored.count, list(scored.values)) == ("negative_aum", 1, ["negative_aum"])


def test_wrong_labels_are_counted_as_in_an_example_of_cleanlab(monkeypatch):
    """The example is at https://github.com/cleanlab/cleanlab/discussions/405."""
    pytest.importorskip("cleanlab")
    given = np.array([0, 0, 1, 1, 2, 2])
    rows = [
        [0.9, 0.025, 0.075],
        [0.75, 0.15, 0.1],
        [0.1, 0.05, 0.85],
        [0.3, 0.5, 0.2],
        [0.05, 0.9, 0.05],
        [0.1, 0.1, 0.8],
    ]
    scored = Scored(np.arange(6), given, given, {}, 0)
    train = Split(torch.arange(6).repeat(3, 2, 2, 1).permute(3, 0, 1, 2).to(torch.uint8), torch.zeros(6).long())
    network = [lambda images: (torch.tensor(rows).log()[images[:, 0, 0, 0].long()], None)] * 2
    runs = [trained_on(0, 1, 2), trained_on(3, 4, 5)]
    networks.confident_learning(scored, runs, network, train)
    assert scored.count == 2
    assert scored.ranked[:2].tolist() == [2, 4]
    assert scored.suggested[[2, 4]].tolist() == [2, 1]


@pytest.mark.parametrize("most", [3, 100])
def test_near_duplicates_are_those_of_a_loop(most):
    random = torch.Generator().manual_seed(0)
    train, test = (torch.randint(0, 256, (count, 3, 4, 4), generator=random).to(torch.uint8) for count in (2500, 7))
    train[1234] = test[3]
    train[2345] = test[5] // 2 + 3  # darker, which changes its direction only slightly
    network = CustomNetwork(5, 4).eval()
    torch.nn.init.zeros_(network.layers[2].weight)  # the predictions do not matter
    pairs = networks.near_duplicates(
        Predictor(network, accelerator="cpu"),
        Split(train, torch.zeros(2500).long()),
        Split(test, torch.zeros(7).long()),
        most,
    )
    features = [network.layers[:2](images).double() for images in (train, test)]
    expected = []
    for number, image in enumerate(features[1]):
        cosines = [
            (float(image @ other / image.norm() / other.norm()), place) for place, other in enumerate(features[0])
        ]
        similarity, place = max(cosines)
        expected.append((similarity, place, number))
    expected = sorted(expected, reverse=True)[:most]
    assert [pair[1:] for pair in pairs] == [pair[1:] for pair in expected]
    assert [pair[0] for pair in pairs] == pytest.approx([pair[0] for pair in expected], abs=1e-5)
    assert pairs[0][1:] == (1234, 3)
