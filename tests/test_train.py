import errno
import json
import math
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from cifarnet import cli
from cifarnet.build import build
from cifarnet.checkpoint import Checkpoint
from cifarnet.cli import CONFIGS
from cifarnet.config import validate
from cifarnet.errors import Interrupted
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, SMALL, assert_same_weights, picture, signal_at, weights


def events(folder: Path) -> dict[str, dict[str, list]]:
    """Return {kind: {tag: events}} of all event files in a run's folder."""
    found: dict[str, dict[str, list]] = {"scalars": {}, "images": {}}
    for file in sorted(folder.glob("events.*")):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0, "images": 0}).Reload()
        for kind, read in [("scalars", accumulator.Scalars), ("images", accumulator.Images)]:
            for tag in accumulator.Tags()[kind]:
                found[kind].setdefault(tag, []).extend(read(tag))
    return found


def test_a_run_writes_its_record_pictures_checkpoints_and_logs(config, tmp_path, capsys):
    score = train(config()).val_accuracy
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    rows = metrics["history"]
    assert score == metrics["val_accuracy"] == max(row["val/accuracy"] for row in rows)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert metrics["epochs"] == 2
    assert (metrics["data"]["train"], metrics["data"]["val"]) == (180, 20)
    assert metrics["config"]["data"]["shuffle_seed"] == "${seed}"  # as written
    assert (metrics["resolved"]["data"]["shuffle_seed"], metrics["resolved"]["scheduler"]["total_steps"]) == (0, 10)
    assert [session["precision"] for session in metrics["sessions"]] == ["32-true"]
    assert metrics["versions"]["torch"]
    for name in ("predictions.png", "accuracy.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]

    printed = capsys.readouterr().out
    assert f"  {metrics['test_accuracy']:.0%}  (50 images" in printed
    assert f"  {score:.0%}  (epoch" in printed  # of 20 images

    logged = events(run)
    assert set(logged["scalars"]) == {
        *("train/cross_entropy", "train/weight_decay", "train/objective", "train/accuracy"),
        *("val/cross_entropy", "val/accuracy", "train/learning_rate"),
    }
    assert [event.step for event in logged["scalars"]["val/accuracy"]] == [1, 2]
    objective, *terms = (
        logged["scalars"][f"train/{name}"][-1].value for name in ("objective", "cross_entropy", "weight_decay")
    )
    assert objective == pytest.approx(sum(terms), rel=1e-6)
    assert set(logged["images"]) == {"train/augmented_batch", "whole_run/predictions", "whole_run/confusion_matrix"}


class ZeroWeights(Callback):
    """Sets all weights in memory to zero after training."""

    def on_fit_end(self, trainer, module):
        for parameter in module.network.parameters():
            nn.init.zeros_(parameter)


def test_the_best_checkpoint_is_tested(config, tmp_path):
    settings = config("trainer.max_epochs=4", "optimizer.lr=0.1")
    train(settings, callbacks=[ZeroWeights()])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    network = Checkpoint.open(tmp_path / "run").network()
    test = instantiate(settings.data).source.test
    with torch.no_grad():
        logits = network(test.images)
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    assert metrics["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["test_cross_entropy"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)


def test_the_csv_logger_replaces_tensorboard(config, tmp_path):
    train(config("logger=csv"))
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert "val/accuracy" in header.split(",")
    assert "epoch" not in header.split(",")
    assert len(rows) == 3
    assert not list((tmp_path / "run").glob("events.*"))


def test_runs_with_one_seed_are_equal_and_with_another_differ(config, tmp_path):
    for folder, overrides in [("one", []), ("same", []), ("other", ["seed=1"])]:
        train(config(*overrides, folder=folder))
    assert_same_weights(tmp_path / "one/checkpoints/last.ckpt", tmp_path / "same/checkpoints/last.ckpt")
    one, other = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "other"))
    assert not torch.equal(one["network.features.0.weight"], other["network.features.0.weight"])
    assert [build(config(f"seed={seed}")).classifier.seed for seed in (0, 1)] == [0, 1]  # also of dropout
    # the split does not depend on the seed
    assert torch.equal(one["network.normalize.mean"], other["network.normalize.mean"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("epoch", "batch"), [(1, 2), (0, 0), (1, 4), (2, 4)], ids=["middle", "first", "end", "last"])
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, precision, epoch, batch):
    """With five batches an epoch, dropout and momentum, whose state must be restored."""
    recipe = ["trainer.max_epochs=3", f"trainer.precision={precision}", "model.drop_rate=0.2", "optimizer.lr=0.02"]
    train(config(*recipe, folder="whole"))

    stop = signal_at(epoch, batch, signal.SIGINT)
    with pytest.raises(Interrupted) as interrupted:
        train(config(*recipe, stop, folder="parts"))
    assert interrupted.value.status == 130
    last = tmp_path / "parts/checkpoints/last.ckpt"
    assert str(last) in str(interrupted.value)
    assert not (tmp_path / "parts/metrics.json").exists()

    step = Checkpoint.open(last).step
    train(*resume(last, [ALLOW_SIGNAL]))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(tmp_path / "whole/checkpoints" / name, tmp_path / "parts/checkpoints" / name)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]
    assert whole["test_accuracy"] == parts["test_accuracy"]
    assert [session["from_step"] for session in parts["sessions"]] == ([0, step] if step < 15 else [0])
    assert len(whole["sessions"]) == 1


def test_on_a_full_disk_the_previous_checkpoint_is_kept(config, tmp_path, monkeypatch):
    train(config("trainer.max_epochs=1", "scheduler=constant"))
    last = tmp_path / "run/checkpoints/last.ckpt"
    before = last.read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # the temporary folder is not used

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        train(*resume(last, ["trainer.max_epochs=2"]))
    assert ".ckpt cannot be written: No space left on device" in cli.explain(error.value)
    assert last.read_bytes() == before
    assert sorted(os.listdir(last.parent)) == ["best.ckpt", "last.ckpt"]


def test_averaged_weights_are_validated_tested_and_saved(config, tmp_path):
    averaging = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"
    train(config(averaging, "optimizer.lr=0.02"))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert all(math.isfinite(row["val/cross_entropy"]) for row in metrics["history"])
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    learned = content["current_model_state"]
    assert not torch.equal(learned["network.head.weight"], content["state_dict"]["network.head.weight"])
    built = build(config())
    network = Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt").network()
    accuracies = {}
    for split in (built.data.source.validation, built.data.source.test):
        with torch.no_grad():
            accuracies[len(split)] = (network(split.images).argmax(1) == split.labels).double().mean().item()
    assert metrics["history"][-1]["val/accuracy"] == pytest.approx(accuracies[20])
    if metrics["tested_epoch"] == 2:
        assert metrics["test_accuracy"] == pytest.approx(accuracies[50])


def test_validations_within_epochs_are_recorded(config, tmp_path):
    score = train(config("+trainer.val_check_interval=2", "optimizer.lr=0.02")).val_accuracy  # of five batches
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    rows = metrics["within_epochs"] + metrics["history"]
    assert [row["epoch"] for row in metrics["within_epochs"]] == [0.4, 0.8, 1.4, 1.8]
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    monitored = next(state for key, state in best["callbacks"].items() if "best_model_score" in state and "val" in key)
    assert score == metrics["val_accuracy"] == pytest.approx(monitored["best_model_score"].item())
    assert metrics["val_accuracy"] == max(row.get("val/accuracy", 0) for row in rows)
    assert metrics["tested_epoch"] == next(row["epoch"] for row in rows if row.get("val/accuracy") == score)
    assert len(events(run)["scalars"]["val/accuracy_within_epochs"]) == 4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped(config, tmp_path, precision, algorithm):
    """With a learning rate of 1, the first step is the clipped gradient."""
    plain = ["optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "optimizer.lr=1"]
    clip = ["+trainer.gradient_clip_val=0.001", f"+trainer.gradient_clip_algorithm={algorithm}"]
    one_step = ["scheduler=constant", "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "data.val_fraction=0"]
    settings = config(*plain, *clip, *one_step, f"trainer.precision={precision}")
    before = build(settings).classifier.network.state_dict()
    train(settings)
    after = weights(tmp_path / "run/checkpoints/last.ckpt")
    steps = torch.cat([(after[f"network.{name}"] - value).flatten() for name, value in before.items()])
    length = steps.norm() if algorithm == "norm" else steps.abs().max()
    assert length.item() == pytest.approx(0.001, rel=0.01)


def test_without_validation_callbacks_that_monitor_training_stay(config, tmp_path):
    stop = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/objective, patience: 1, min_delta: 9}"
    train(config("data.val_fraction=0", f"+callbacks.early={stop}", "trainer.max_epochs=5"))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["epochs"] == 2  # no epoch is better by 9
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["last.ckpt"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of dark cats and bright dogs: 40 training and 20 test images of each."""
    for split, count in [("train", 40), ("test", 20)]:
        for name, shade in [("cat", 0), ("dog", 120)]:
            for i in range(count):
                picture(tmp_path / f"pictures/{split}/{name}/{i}.png", (shade + i, 50, 100 + i))
    return tmp_path / "pictures"


def test_a_data_set_smaller_than_a_batch_trains(command, pictures, tmp_path):
    status, printed, error = command(
        "data=folder", "data.root=pictures", "trainer=cpu", "threads=1", "hydra.run.dir=run", "optimizer.lr=0.01"
    )
    assert status == 0, error
    assert re.search(r"data\.batch_size=128: .*72 images", printed)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["data"] | {"sha256": None} == {
        **{"source": "ImageFolder", "classes": 2, "train": 72, "val": 8, "test": 40},
        "sha256": None,
    }
    assert len(metrics["history"]) == 20
    assert metrics["test_accuracy"] > 0.9


def test_the_images_of_a_folder_named_val_choose_the_checkpoint(config, pictures, tmp_path):
    picture(pictures / "val/dog/0.png", (150, 50, 110))
    picture(pictures / "val/cat/0.png", (10, 50, 110))
    folder = ["data=folder", f"data.root={pictures}", "data.val_fraction=0", "data.batch_size=20"]
    score = train(config(*folder, without="data")).val_accuracy
    assert (tmp_path / "run/checkpoints/best.ckpt").exists()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert score == metrics["val_accuracy"] == max(row["val/accuracy"] for row in metrics["history"])


def test_lean_callbacks_give_the_same_result(config, tmp_path):
    train(config("trainer.max_epochs=3", "model.drop_rate=0.1"))

    lean = config("trainer.max_epochs=3", "model.drop_rate=0.1", "callbacks=lean", folder="lean")
    score = train(lean).val_accuracy
    assert not (tmp_path / "lean/checkpoints").exists()
    metrics, lean_metrics = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("run", "lean"))
    assert score == lean_metrics["val_accuracy"] == metrics["history"][-1]["val/accuracy"]
    for key in ("train/objective", "val/cross_entropy"):
        assert lean_metrics["history"][-1][key] == metrics["history"][-1][key]
    assert all("val/accuracy" not in row for row in lean_metrics["history"][:-1])


def test_the_csv_log_of_a_resumed_run_is_complete(config, tmp_path):
    stop = signal_at(1, 1, signal.SIGTERM)
    with pytest.raises(Interrupted) as interrupted:
        train(config("logger=csv", stop))
    assert interrupted.value.status == 143
    train(*resume(tmp_path / "run", [ALLOW_SIGNAL]))
    _, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3  # two epochs and the test


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw", "scheduler=cosine"],
        ["scheduler=constant", "callbacks.pictures=null"],
        ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.accumulate_grad_batches=2"],
        ["~callbacks", "~logger"],
        ["optimizer=muon"],
        ["+recipe.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_other_choices_train(config, overrides, tmp_path):
    settings = config(*overrides)
    score = train(settings).val_accuracy
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert score == metrics["val_accuracy"]
    assert 0 < metrics["test_cross_entropy"] < 3  # chance is 2.3
    assert metrics["epochs"] == settings.trainer.max_epochs


def test_a_partial_run_reports_no_result(config, capsys):
    train(config("+trainer.limit_test_batches=1", "data.eval_batch_size=10"))
    assert "(not a full run: limit_test_batches=1, " in capsys.readouterr().out


def test_without_a_progress_bar_a_line_per_epoch_is_printed(config, capsys):
    train(config("+trainer.enable_progress_bar=false"))
    assert "Epoch 2/2  loss" in capsys.readouterr().out


def test_training_on_all_images_tests_the_last_weights(config, tmp_path, capsys):
    score = train(config("data.val_fraction=0")).val_accuracy
    assert math.isnan(score)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_accuracy"] is None
    assert (metrics["data"]["train"], metrics["data"]["val"]) == (200, 0)
    assert metrics["tested_epoch"] == metrics["epochs"] == 2
    assert "validation accuracy  none" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["last.ckpt"]
    assert Checkpoint.open(tmp_path / "run").path.name == "last.ckpt"


def test_a_resumed_speedrun_equals_an_uninterrupted_one(config, tmp_path):
    recipe = ["+experiment=speedrun", "model.widths=[8,8,8]", "trainer.max_epochs=3", "data.train_sizes=[16,24,32]"]

    def small(*overrides, folder="parts"):
        return config(*recipe, "data.batch_size=20", *overrides, folder=folder, without="model")

    train(small(folder="whole"))
    with pytest.raises(Interrupted):
        train(small(signal_at(1, 2, signal.SIGTERM)))
    last = tmp_path / "parts/checkpoints/last.ckpt"
    train(*resume(last, [ALLOW_SIGNAL]))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", last)


class Crash(Callback):
    """Raises in the first batch of the second epoch, before which last.ckpt was saved at the end of the first."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise ZeroDivisionError


def test_a_run_that_crashed_is_resumed_with_the_losses_that_select_images(config, tmp_path):
    settings = ["data.hardest_share=0.6", "trainer.max_epochs=3", "optimizer.lr=0.05"]
    train(config(*settings, folder="whole"))
    with pytest.raises(ZeroDivisionError):
        train(config(*settings, folder="parts"), callbacks=[Crash()])
    train(*resume(tmp_path / "parts"))
    assert_same_weights(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "parts/checkpoints/last.ckpt")


def test_the_loader_selects_images_by_their_losses(config, tmp_path):
    """The weights do not change, so that the losses of two epochs, of half of the images each, can be recomputed."""
    constant = ["optimizer.lr=0", "data.flip=none", "data.crop_padding=0", "data.val_fraction=0", "data.batch_size=20"]
    settings = config(*constant, "data.hardest_share=0.5")
    train(settings)
    checkpoint = Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt")
    network = checkpoint.network()
    images = instantiate(settings.data).source.train
    with torch.no_grad():
        losses = F.cross_entropy(network(images.images), images.labels, reduction="none")
    loader = checkpoint.content["callbacks"]["TrainingState"]["loader"]
    torch.testing.assert_close(loader["observed"], losses)
    assert loader["losses"].isinf().sum() == 100  # before the second epoch
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [row["train/cross_entropy"] for row in metrics["history"]] == pytest.approx(
        [float(losses[at].mean()) for at in (loader["losses"].isfinite(), loader["losses"].isinf())]
    )


class RefuseToWait(Callback):
    """Makes torch raise an error if a training step, or the loader of its batch, waits for the GPU."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to wait for")
@pytest.mark.parametrize("recipe", [[], ["+experiment=speedrun", "data.batch_size=40"]], ids=["cnn", "speedrun"])
@pytest.mark.parametrize("on_device", [True, False])
def test_no_step_waits_for_the_gpu(config, recipe, on_device):
    refuse = "+callbacks.refuse={_target_: test_train.RefuseToWait}"
    settings = [*recipe, "trainer=gpu", "trainer.max_epochs=2", f"data.on_device={str(on_device).lower()}", refuse]
    train(config(*settings, without=("trainer", "model")))


@pytest.mark.parametrize("experiment", ["quickstart", "speedrun"])
@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(
            f"{group}={path.stem}",
            marks=[pytest.mark.slow] if group == "model" and path.stem not in ("cnn", "speednet", "vgg16_bn") else [],
        )
        for group in ("model", "optimizer", "scheduler")
        for path in sorted((CONFIGS / group).glob("*.yaml"))
        if "???" not in path.read_text()  # timm, torchvision and trained need a name
    ],
)
def test_any_choice_swaps_in_any_experiment(config, tmp_path, experiment, choice):
    """For four steps."""
    few = ["data=synthetic", "data.train_size=130", "data.test_size=20", "data.batch_size=40", "trainer.max_epochs=2"]
    short = ["trainer=cpu", "callbacks=lean", "~logger", "+trainer.limit_train_batches=2"]
    train(config(f"+experiment={experiment}", choice, *few, *short, without=""))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["epochs"] == 2
    assert math.isfinite(metrics["history"][-1]["train/cross_entropy"])


EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != "finetune"])  # it needs a run
@pytest.mark.parametrize(
    "choice",
    [
        "model=cnn",
        "model=resnet18",
        "optimizer=adamw",
        "optimizer=muon",
        "scheduler=onecycle",
        "objective=focal",
        "+recipe=ema",
    ],
)
def test_a_choice_keeps_no_settings_of_the_choice_that_it_replaces(experiment, choice):
    validate(cli.compose("train", [f"+experiment={experiment}", choice, "output_dir=run"]))


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[] if name in ("baseline", "resnet20") else [pytest.mark.slow]) for name in EXPERIMENTS],
)
def test_every_experiment_trains_a_step(config, tmp_path, experiment):
    few = ["data=synthetic", "data.train_size=100", "data.test_size=10", "data.batch_size=8", "trainer.max_epochs=3"]
    if experiment == "finetune":
        train(config(folder="base"))
        few.append(f"model.checkpoint={tmp_path / 'base'}")
    train(config(f"+experiment={experiment}", *few, "+trainer.limit_train_batches=1", "trainer=cpu", without=""))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert math.isfinite(metrics["history"][-1]["train/cross_entropy"])
    assert metrics["name"] == experiment


def test_a_finished_run_can_be_tested_with_test_time_augmentation(config, tmp_path):
    train(config())
    plain = json.loads((tmp_path / "run/metrics.json").read_text())
    train(*resume(tmp_path / "run", ["module.tta=mirror"]))
    augmented = json.loads((tmp_path / "run/metrics.json").read_text())
    assert augmented["tta"] == "mirror"
    assert augmented["test_cross_entropy"] != plain["test_cross_entropy"]
    assert augmented["test_accuracy_one_view"] == plain["test_accuracy"]


def test_a_folder_of_photographs_is_trained(config, few_photographs, tmp_path):
    train(config("data=folder", f"data.root={few_photographs}", "data.batch_size=32", without="data"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["data"]["train"], metrics["data"]["val"], metrics["data"]["test"]) == (180, 20, 50)


class RemoveFolder(Callback):
    """Removes the run's folder after the first epoch."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            shutil.rmtree(trainer.default_root_dir)


def test_a_folder_that_is_removed_while_training_is_reported(command):
    removal = "+callbacks.removal={_target_: test_train.RemoveFolder}"
    status, _, error = command(*SMALL, "threads=1", removal, "hydra.run.dir=run")
    assert status == 1
    assert error.strip().endswith("run was removed while it was in use. Run the command again.")
    assert "Traceback" not in error
