import json
import signal

import pytest

from cifarnet.checkpoint import Checkpoint
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, signal_at


@pytest.mark.parametrize(
    "settings",
    [
        ["callbacks.best.filename='{epoch}-{val/accuracy:.3f}'"],  # Lightning inserts the metric's name: a folder
        ["callbacks.best.filename='{epoch}'", "+callbacks.best.save_top_k=2"],
    ],
)
def test_a_best_checkpoint_can_have_any_name(config, tmp_path, settings):
    settings = [*settings, "trainer.max_epochs=3"]
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*settings, signal_at(1, 1, signal.SIGTERM), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    for key in ("test_cross_entropy", "val_accuracy", "tested_epoch", "history"):
        assert whole[key] == parts[key]
    opened = Checkpoint.open(tmp_path / "parts")  # as the other commands do
    assert (opened.path.name, opened.epoch) == ("best.ckpt", parts["tested_epoch"])
    best = max(parts["history"], key=lambda row: row["val/accuracy"])
    assert parts["val_accuracy"] == best["val/accuracy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["callbacks.best.filename=../escaped"], "escaped.ckpt is outside"),
        (["callbacks.best.filename=/tmp/escaped"], "escaped.ckpt is outside"),
        (["callbacks.best.filename='{epoch:/>9}/../../../x'"], "outside"),
        (["callbacks.best.dirpath=elsewhere"], "best.ckpt is outside"),
        (["callbacks.best.filename=last", "callbacks.last=null"], "another checkpoint replaces last.ckpt"),
        (["callbacks.last.filename=best"], "another checkpoint replaces best.ckpt"),
        (["+callbacks.best.save_top_k=3"], "save_top_k=3 needs a name for each epoch"),
        (["callbacks.best.filename='{epoch'"], "is not valid"),
        (["callbacks.best.filename='{epoch:q}'"], "is not valid"),
        ([f"callbacks.best.filename={'x' * 250}"], "more than 200 bytes"),
    ],
)
def test_a_name_that_would_lose_a_checkpoint_is_refused(config, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^ModelCheckpoint: filename=.*{message}"):
        train(config(*settings))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_without_the_state_of_the_optimizer_cannot_be_resumed(config, tmp_path):
    train(config("+callbacks.best.save_weights_only=true"))
    with pytest.raises(UserError, match="contains no training state"):
        resume(tmp_path / "run/checkpoints/best.ckpt")
