"""Out-of-fold probabilities and near-duplicates, compared with loops over the images."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cifarnet.auditing import networks
from cifarnet.auditing.scores import Scored
from cifarnet.data import ImageDataModule, Source, Split
from cifarnet.inference.predictor import Predictor
from conftest import CustomNetwork

COUNT, CLASSES = 24, 3


def table(run: int) -> torch.Tensor:
    return torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(run))


class Lookup(nn.Module):
    """A network whose logits, [N, num_classes], depend on the number that an image shows."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


class Images(ImageDataModule):
    def __init__(self, train: torch.Tensor, test: torch.Tensor) -> None:
        super().__init__(val_fraction=0, crop_padding=0)
        self.parts = [Split(images, torch.zeros(len(images)).long()) for images in (train, test)]

    def read(self):
        return Source(list("abc"), *self.parts)


def numbers(count: int) -> Images:
    """Return training images that show the numbers from 0."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2)
    return Images(images, images)


def predictor(logits: torch.Tensor) -> Predictor:
    return Predictor(Lookup(logits).eval(), accelerator="cpu")


@pytest.fixture
def scored():
    given = np.arange(COUNT) % CLASSES
    return Scored(np.arange(COUNT), given, given, {"negative_aum": np.zeros(COUNT)}, 1)


def trained_on(*index) -> dict[str, np.ndarray]:
    return {"index": np.array(index), "class_names": np.array(list("abc"))}


def test_out_of_fold_probabilities_are_those_of_a_loop(scored):
    pytest.importorskip("cleanlab")
    folds = [[i for i in range(COUNT) if i % 3 != fold] for fold in range(3)]
    folds.append([i for i in range(COUNT) if i % 2])  # even images are classified by two networks
    folds.append(list(range(COUNT)))
    runs = [trained_on(*fold) for fold in folds]
    predictors = [predictor(table(run)) for run in range(5)]
    found = networks.confident_learning(scored, runs, predictors, numbers(COUNT))
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
    agreement = sum(row.argmax() == image % CLASSES for image, row in enumerate(found)) / COUNT
    assert scored.agreement == pytest.approx(agreement)


def test_without_all_folds_nothing_is_predicted(scored):
    runs = [trained_on(*range(COUNT)), trained_on(*range(5, COUNT))]
    assert networks.confident_learning(scored, runs, [], numbers(COUNT)) is None
    assert (scored.order, scored.count, list(scored.values)) == ("negative_aum", 1, ["negative_aum"])


def test_wrong_labels_are_counted_as_in_an_example_of_cleanlab():
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
    runs = [trained_on(0, 1, 2), trained_on(3, 4, 5)]
    networks.confident_learning(scored, runs, [predictor(torch.tensor(rows).log())] * 2, numbers(6))
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
    pairs = networks.near_duplicates(Predictor(network, accelerator="cpu"), Images(train, test), most)
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
