"""The objective that `build` makes from a config."""

import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.build import build
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import SignalAt, assert_same_weights

WEIGHTS = [1, 2, 0.5, 1, 1, 3, 1, 1, 1, 0.25]
LIST = f"objective.weight={WEIGHTS}"


@pytest.mark.parametrize(
    "overrides",
    [
        (LIST,),
        (LIST, "objective.label_smoothing=0.1"),
        (LIST, "objective._target_=torch.nn.functional.cross_entropy", "+objective._partial_=true"),
    ],
)
def test_a_list_of_class_weights_is_a_tensor(config, overrides):
    objective = build(config(*overrides)).classifier.objective
    logits, labels = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    smoothing = 0.1 if len(overrides) == 2 else 0.0
    log_prob = logits.log_softmax(1)
    targets = torch.eye(10) * (1 - smoothing) + smoothing / 10
    by_hand = -(targets * log_prob * torch.tensor(WEIGHTS)).sum(1)  # the weight of a class multiplies its term
    torch.testing.assert_close(objective(logits, labels), by_hand)


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_balanced_class_weights(config, name):
    _, classifier, data, _ = build(config("data.imbalance=6", "objective.weight=balanced", f"objective={name}"))
    counts = data.source.train.labels.bincount()
    logits, labels = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    by_hand = -logits.log_softmax(1).diagonal() * counts.sum() / (10 * counts)  # as in scikit-learn
    by_hand = by_hand * (1 - logits.softmax(1).diagonal()) ** 2 if name == "focal" else by_hand
    torch.testing.assert_close(classifier.objective(logits, labels), by_hand)


def test_a_run_with_class_weights_matches_its_resumed_one(config, tmp_path):
    train(config(LIST, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(LIST, folder="parts"), callbacks=[SignalAt(1, 1, signal.SIGTERM)])
    train(*resume(tmp_path / "parts"))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1,2]", "all 10 classes"),
        ("5", "list"),
        ("even", "list"),
        ("[a,b]", "list"),
        ("[nan,1,1,1,1,1,1,1,1,1]", "at least 0"),
    ],
)
def test_other_class_weights_are_refused(config, value, message):
    with pytest.raises(UserError, match=rf"^objective.*{message}"):
        train(config(f"objective.weight={value}"))


class Unsafe(Callback):
    """Has a state that cannot be read safely."""

    def state_dict(self):
        return {"path": Unsafe}


def test_a_state_that_cannot_be_read_is_refused_at_the_start(config, tmp_path):
    with pytest.raises(UserError, match=r"^Unsafe.*state_dict"):
        train(config(), callbacks=[Unsafe()])
    assert not (tmp_path / "run/checkpoints").exists()
