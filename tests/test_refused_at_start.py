"""Settings that are refused before training, and the summary of a run."""

import re

import pytest
from lightning.pytorch.callbacks import Callback

from cifarnet.build import build
from cifarnet.classifier import Classifier
from cifarnet.cli import compose
from cifarnet.errors import UserError
from cifarnet.records.record import Record
from cifarnet.train import train
from cifarnet.trainer import METRICS
from conftest import SMALL

CALLBACKS = "lightning.pytorch.callbacks"
STOPPING = f"+callbacks.early={{_target_: {CALLBACKS}.EarlyStopping, monitor: val/accuracy}}"


class Metrics(Callback):
    """Keeps the names of the metrics that a run computes."""

    names: frozenset = frozenset()

    def on_train_end(self, trainer, module):
        self.names = frozenset(trainer.callback_metrics)


def test_the_metrics_that_can_be_monitored_are_those_of_a_run(config):
    seen = Metrics()
    train(config("trainer.max_epochs=1", "scheduler=constant"), callbacks=[seen])
    assert seen.names == set(METRICS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([STOPPING.replace("val/accuracy", "val/acc")], "EarlyStopping monitors val/acc,.*val/cross_entropy"),
        (["callbacks.best.monitor=val_accuracy"], "ModelCheckpoint monitors val_accuracy,.*val/accuracy"),
        ([STOPPING, "+trainer.limit_val_batches=0"], "monitors val/accuracy,.*train/accuracy"),
        ([STOPPING, "data.val_fraction=0"], "monitors val/accuracy,.*train/accuracy"),
        ([f"+callbacks.finder={{_target_: {CALLBACKS}.LearningRateFinder}}"], r"LearningRateFinder.*cifarnet\.inspect"),
        ([f"+callbacks.finder={{_target_: {CALLBACKS}.BatchSizeFinder}}"], r"BatchSizeFinder.*data\.batch_size"),
        (
            [f"+callbacks.prune={{_target_: {CALLBACKS}.ModelPruning, pruning_fn: l1_unstructured}}"],
            "ModelPruning.*torch.nn.utils.prune",
        ),
        (
            [
                f"+callbacks.{name}={{_target_: {CALLBACKS}.ModelCheckpoint, monitor: val/accuracy, mode: max}}"
                for name in ("one", "two")
            ],
            "^callbacks: two callbacks have the same settings: ModelCheckpoint",
        ),
        (["+module.teacher=5"], r"^module\.teacher=5.*_target_"),
        (["model.hidden='16'"], r"^model\.hidden=16 .*oc\.decode"),
        (["trainer.precision=7"], r"64, 32, 16, transformer-engine, .*or null\.$"),
        (["+logger.log_graph=true"], r"^logger\.log_graph=True.*logger\.tensorboard\.log_graph=True"),
        (["optimizer=muon", "+optimizer.bias.foo=1"], "bias has no setting foo.*momentum"),
        (["+model.num_classes=3"], "num_classes=3.*10 classes"),
        (["+start.sha256=x"], "^start=.*model=trained"),
        (["++start=3"], "^start=3 .*model=trained"),
        ([STOPPING], r"EarlyStopping monitors val/accuracy with the wrong mode\. Add mode: max"),
        (["callbacks.best.monitor=val/cross_entropy"], r"ModelCheckpoint.*val/cross_entropy.*mode: min"),
        ([f"+callbacks.x={{_target_: {CALLBACKS}.BaseFinetuning}}"], r"BaseFinetuning is not supported.*backbone"),
        ([f"+callbacks.x={{_target_: {CALLBACKS}.WeightAveraging, device: -2}}"], r"callbacks\.x\.device=-2.*cpu"),
        (["+trainer.limit_test_batches=0.5"], r"^trainer\.limit_test_batches=0\.5 of 1 batches"),
        (["+trainer.limit_train_batches=0"], r"^scheduler needs the number of steps.*limit_train_batches"),
        (["+objective.weight=[-1,1,1,1,1,1,1,1,1,1]"], r"^objective\.weight=.* each at least 0\.$"),
        (["total_steps=5"], r"^total_steps=5.*max_steps"),
        (["output_dir=/proc/x"], "/proc/x cannot be created"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(config, overrides, message):

    with pytest.raises(UserError, match=message):
        train(config(*overrides))


def test_a_config_from_python_needs_a_folder():
    with pytest.raises(UserError, match="output_dir is not set: add output_dir="):
        build(compose("train", [*SMALL, "output_dir=null"]))
    with pytest.raises(UserError, match="output_dir is not set: add output_dir="):
        build(compose("train", [*SMALL, "output_dir='${hydra:runtime.output_dir}'"]))  # as with Hydra's own compose


def test_lightnings_way_of_loading_names_ours(run):
    with pytest.raises(UserError, match=r"cifarnet\.load\('.*best\.ckpt'\)"):
        Classifier.load_from_checkpoint(run / "checkpoints/best.ckpt")


def test_the_results_of_another_run_are_not_replaced(config, tmp_path):
    settings = ["trainer.max_epochs=1", "scheduler=constant"]
    train(config(*settings))
    before = (tmp_path / "run/metrics.json").read_text()
    for again in (config(*settings, "seed=1"), config(*settings, "seed=1", "callbacks=lean")):
        with pytest.raises(UserError, match=r"/run contains the results of another run.*ckpt_path=.*/run$"):
            train(again)
    assert (tmp_path / "run/metrics.json").read_text() == before


def test_the_end_of_training_before_the_last_epoch_is_reported(config, capsys):
    stopping = STOPPING.replace("val/accuracy}", "val/accuracy, mode: max, patience: 1, min_delta: 1}")
    train(config(stopping, "trainer.max_epochs=5", "scheduler=constant"))
    assert re.search(r"training .* images/s, ended after 2 of 5 epochs\n", capsys.readouterr().out)


def test_an_epoch_without_validation_shows_no_accuracy(config, capsys):
    train(config("trainer.max_epochs=3", "+trainer.check_val_every_n_epoch=2", "scheduler=constant"))
    shown = re.findall(r"Epoch (\d)/3 .*?( val |images/s)", capsys.readouterr().out)
    assert [(epoch, "val" in found) for epoch, found in shown] == [("1", False), ("2", True), ("3", False)]


def test_a_name_with_an_interpolation_as_text(command):
    status, _, error = command(*SMALL, r"name='\${oc.env:HOME}'")
    assert (status, error.count("\n")) == (1, 1), error
    assert "Check the name" in error


@pytest.mark.parametrize("setting", ["optimizer.lr = 0.1", "optimizer.lr"])
def test_spaces_around_the_equals_sign(command, setting):
    status, _, err = command(*SMALL, setting)
    assert status == 1
    assert "key=value, without spaces" in err


def test_a_summary_names_whole_numbers_only_if_they_exist(config, capsys):
    train(
        config(
            "+trainer.limit_test_batches=0",
            "+trainer.val_check_interval=2",
            "trainer.max_epochs=1",
            "scheduler=constant",
        )
    )
    printed = capsys.readouterr().out
    assert re.search(r"\(epoch \d(\.\d{1,2})? of 1\)", printed)
    assert "test accuracy        none" in printed


def test_a_network_without_fit_takes_no_time_to_fit(config, tmp_path):
    train(config("trainer.max_epochs=1", "scheduler=constant"))
    assert Record.read(tmp_path / "run/metrics.json").fit_seconds == 0
