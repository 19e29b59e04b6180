"""Training dynamics, compared with the logits of each step."""

import math
import signal
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.build import build
from cifarnet.callbacks import dynamics
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, TWO, assert_same_weights, signal_at

SETTINGS = ["callbacks=dynamics", "data.label_noise=0.2"]
HARDEST = [*SETTINGS, "data.hardest_share=0.6", "data.batch_size=17", "trainer.max_epochs=3"]


class Steps(Callback):
    """Saves the indices, the labels and the network's logits of each training step."""

    def __init__(self) -> None:
        self.steps = []

    def on_fit_start(self, trainer, module):
        module.network.register_forward_hook(
            lambda network, _, logits: setattr(self, "logits", logits.detach().clone())
        )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append((trainer.current_epoch, batch.index.tolist(), batch.labels.tolist(), self.logits.tolist()))


def read(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "dynamics.npz", allow_pickle=False) as file:
        return dict(file)


def by_hand(steps, epochs, count) -> dict[str, np.ndarray]:
    """Compute the arrays of the file with loops over the images of each step."""
    names = ("loss", "probability", "margin", "error")
    arrays = {name: np.full((epochs, count), math.nan) for name in names}
    arrays["predicted"] = np.full((epochs, count), -1)
    for epoch, index, labels, logits in steps:
        for image, label, row in zip(index, labels, logits, strict=True):
            total = sum(math.exp(logit) for logit in row)
            probabilities = [math.exp(logit) / total for logit in row]
            others = [logit for number, logit in enumerate(row) if number != label]
            error = [value - (number == label) for number, value in enumerate(probabilities)]
            arrays["loss"][epoch, image] = -math.log(probabilities[label])
            arrays["probability"][epoch, image] = probabilities[label]
            arrays["margin"][epoch, image] = row[label] - max(others)
            arrays["error"][epoch, image] = math.sqrt(sum(value**2 for value in error))
            arrays["predicted"][epoch, image] = row.index(max(row))
    return arrays


@pytest.mark.parametrize("settings", [SETTINGS, HARDEST, [*SETTINGS, "trainer.precision=64-true"]])
def test_values_are_those_of_each_step(config, tmp_path, settings):
    steps = Steps()
    record = train(config(*settings), callbacks=[steps])
    found = read(tmp_path / "run")
    source = build(config(*settings, folder="other")).data.source
    expected = by_hand(steps.steps, record.epochs, len(source.train))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].astype(float), values, rtol=2e-3, atol=1e-4, err_msg=name)
    assert np.isnan(expected["loss"]).any()  # the images of the incomplete last batch, and those with low losses
    assert {str(found[name].dtype) for name in ("loss", "probability", "margin", "error")} == {"float16"}
    assert found["labels"].tolist() == source.train.labels.tolist()
    assert source.selection["wrong_labels"] > 0
    assert found["index"].tolist() == source.train_index.tolist()
    assert found["class_names"].tolist() == source.class_names


def test_the_results_of_the_run_do_not_change(config, tmp_path):
    train(config("callbacks=dynamics", folder="recorded"))
    train(config(folder="default"))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(*(tmp_path / folder / "checkpoints" / name for folder in ("recorded", "default")))


def assert_same(one, other):
    first, second = read(one), read(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_a_run_that_stops_within_an_epoch_resumes_with_the_same_values(resumed_run, tmp_path):
    resumed_run(*HARDEST)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / dynamics.FILE).unlink()  # as if the run was killed at the end of training
    train(*resume(tmp_path / "parts"))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_two_ranks_record_what_one_does(sharded_run, tmp_path):
    sharded_run(*HARDEST)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for name in one:
        if name in ("labels", "index", "class_names"):
            assert one[name].tolist() == two[name].tolist()
        else:
            # the weights differ by rounding, which can change a prediction if two logits are nearly equal
            close = np.isclose(one[name].astype(float), two[name].astype(float), 5e-3, 2e-3, equal_nan=True)
            assert close.mean() > 0.995, name


@pytest.mark.slow
def test_two_ranks_that_stop_within_an_epoch_resume_with_the_same_values(config, tmp_path):
    train(config(*HARDEST, *TWO, "threads=1", folder="whole", without=("trainer=cpu",)))
    settings = [*HARDEST, *TWO, "threads=1", signal_at(1, 2, signal.SIGTERM), ALLOW_SIGNAL]
    with pytest.raises(Interrupted):
        train(config(*settings, folder="parts", without=("trainer=cpu",)))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_logits_are_freed_after_the_step(config):
    left = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.logits = weakref.ref(outputs["logits"])

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            left.append(hasattr(self, "logits") and self.logits() is not None)

    train(config("callbacks=dynamics"), callbacks=[Watch()])
    assert left == [False] * 10


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_images_are_refused(config, name):
    with pytest.raises(UserError, match=r"callbacks\.dynamics.*data\.mix.*Remove"):
        train(config("callbacks=dynamics", f"+recipe={name}"))


def test_repeated_images_are_recorded(config, tmp_path):
    train(config("callbacks=dynamics", "data.sampler=balanced", "data.imbalance=10"))
    used = read(tmp_path / "run")["predicted"] >= 0
    assert 0 < used.mean() < 1


def test_an_image_that_two_ranks_used_has_the_values_of_the_first_one(monkeypatch):
    epochs = torch.arange(30, dtype=torch.int16).reshape(2, 5, 3)
    epochs[0, :, 1] = epochs[1, :, 2] = dynamics.UNUSED
    monkeypatch.setattr(dynamics, "all_gather", lambda epoch: list(epochs))
    found = dynamics.over_ranks(epochs[1])
    expected = torch.stack([epochs[0, :, 0], epochs[1, :, 1], epochs[0, :, 2]], 1)
    assert found.tolist() == expected.tolist()
