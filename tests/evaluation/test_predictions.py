import csv
import io
import math

import pytest
import torch
from test_sections import LABELS, STRENGTHS, Coloured

from cifarnet.evaluation.predictions import per_image
from cifarnet.inference.predictor import Predictions
from cifarnet.records.tables import csv_text


def predictions(order):
    """Return what the network of `test_sections` predicts, in this order of the images."""
    index = torch.tensor(order)
    logits = torch.tensor(STRENGTHS)[index] / 51
    return Predictions(torch.zeros(6, 3), logits, torch.tensor(LABELS)[index], index)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_by_hand(temperature):
    order, names = [4, 2, 5, 0, 1, 3], ["red", "green", "blue"]
    rows = per_image(predictions(order), Coloured(batch_size=2), temperature)
    assert [row["image"] for row in rows] == order
    for i, row in zip(order, rows, strict=True):
        powers = [math.exp(strength / 51 / temperature) for strength in STRENGTHS[i]]
        guess = powers.index(max(powers))
        assert (row["class"], row["predicted"]) == (names[LABELS[i]], names[guess])
        assert row["correct"] is (LABELS[i] == guess)
        assert row["probability"] == pytest.approx(powers[guess] / sum(powers))
        assert row["loss"] == pytest.approx(-math.log(powers[LABELS[i]] / sum(powers)))


def test_losses_of_certain_predictions_are_zero():
    test = Predictions(torch.zeros(1, 3), torch.tensor([[99.0, 0, 0]]), torch.tensor([0]), torch.tensor([0]))
    assert [str(row["loss"]) for row in per_image(test, Coloured(batch_size=2))] == ["0.0"]


def test_csv_text():
    rows = [{"image": "=1+1", "class": 'a "b", c', "loss": -0.5}, {"image": "two\nlines", "class": "-x", "other": 1}]
    text = csv_text(rows, ["image", "class", "loss"])
    assert list(csv.reader(io.StringIO(text, newline=""))) == [
        ["image", "class", "loss"],
        ["'=1+1", 'a "b", c', "-0.5"],
        ["two\nlines", "'-x", ""],
    ]
