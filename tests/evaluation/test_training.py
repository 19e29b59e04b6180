import json

import pytest

from cifarnet import checkpoint
from cifarnet.evaluation import training
from cifarnet.train import train
from conftest import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(small(f"output_dir={folder}", "+trainer.val_check_interval=2"))
    return folder


def test_learning_curve_is_the_whole_runs(run):
    path = run / "checkpoints/best.ckpt"  # which may know less
    metrics = json.loads((run / "metrics.json").read_text())
    rows = training.history(checkpoint.read(path), path)
    assert [row for row in rows if row["epoch"] % 1 == 0] == metrics["history"]
    assert len(rows) == len(metrics["history"]) + len(metrics["within_epochs"])
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)


def test_a_lone_checkpoint_shows_what_it_knows(run, tmp_path):
    content = checkpoint.read(run / "checkpoints/last.ckpt")
    rows = training.history(content, tmp_path / "last.ckpt")
    assert [row["epoch"] for row in rows if "train/accuracy" in row]


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[1, 2]",
        "[" * 10**5,
        '{"history": 3}',
        '{"history": [1, null, {"epoch": "x"}, {"epoch": NaN}, {"epoch": 1' + 400 * "0" + "}]}",
    ],
)
def test_a_damaged_record_is_not_drawn(tmp_path, record):
    path = tmp_path / "checkpoints/best.ckpt"
    (tmp_path / "metrics.json").write_text(record)
    assert training.history({}, path) == []
    kept = {"callbacks": {"History": {"epochs": [{"epoch": 1, "val/accuracy": 0.5}]}}}
    assert training.history(kept, path) == [{"epoch": 1, "val/accuracy": 0.5}]


def test_settings_are_those_that_decide(run):
    settings = training.settings(checkpoint.read(run / "checkpoints/best.ckpt"))
    assert (settings["optimizer.lr"], settings["scheduler.max_lr"]) == ("0.05", "0.05")
    assert not {"total_steps", "scheduler.total_steps", "output_dir", "logger.tensorboard._target_"} & settings.keys()
