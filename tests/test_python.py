"""Training from Python: the blocks of docs/python.md, and Lightning's own methods on the parts of a run."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from torch.utils.data import DataLoader, TensorDataset

from cifarnet.build import build
from cifarnet.cli import compose
from cifarnet.data import InMemoryLoader
from cifarnet.errors import UserError
from cifarnet.records.record import Record
from cifarnet.train import train
from conftest import SMALL
from test_train import events

PAGE = Path(__file__).parents[1] / "docs/python.md"
QUICKSTART = '"+experiment=quickstart"'
FAST = ["data.train_size=200", "data.test_size=50", "data.batch_size=20", "trainer=cpu", "threads=1", "model.hidden=16"]
IMAGES, LABELS = torch.rand(40, 3, 32, 32), torch.arange(40) % 10


def plain_results(network, split):
    """Cross-entropy and accuracy in plain PyTorch."""
    with torch.no_grad():
        logits = network.eval()(split.images)
    accuracy = (logits.argmax(1) == split.labels).double().mean().item()
    return logits, F.cross_entropy(logits, split.labels).item(), accuracy


def test_the_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    small = ", ".join([QUICKSTART, *(f'"{setting}"' for setting in [*FAST, "trainer.precision=32-true"])])
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    for block in blocks:
        exec(block.replace(QUICKSTART, small), page)
    assert len(blocks) == 10
    # a folder each: train, build, callback, weights, early stopping, sampler
    assert len(list(Path("lightning_logs/quickstart").iterdir())) == 6
    logits, _, accuracy = plain_results(page["classifier"].network, page["data"].source.test)
    assert torch.allclose(page["logits"], logits, atol=1e-5)
    assert torch.allclose(page["classifier"].network.head(page["embeddings"]), logits, atol=1e-5)
    assert (page["frame"].label == page["frame"].predicted).mean() == pytest.approx(accuracy)
    assert len(page["mistakes"]) == round(50 * (1 - accuracy))
    loader, losses = page["loader"], page["losses"]
    first, again = loader.order(), loader.order()
    assert torch.equal(first, again)
    assert sorted(first.tolist()) == list(range(180))
    assert (losses[first].cummax(0).values - losses[first]).max() <= 1  # the noise is from 0 to 1
    assert (losses[first[:90]].mean() < losses[first[90:]].mean()).item()
    loader.set_epoch(loader.epoch + 1)
    assert not torch.equal(first, loader.order())


def test_train_returns_the_record(config, tmp_path):
    record = train(config("trainer.max_epochs=1", "scheduler=constant"))
    assert record == Record.read(tmp_path / "run/metrics.json")
    assert len(repr(record)) < 1000  # without the config and the history


def test_validate_test_and_predict_return_the_results(config):
    trainer, classifier, data, _ = build(config())
    trainer.fit(classifier, datamodule=data)
    [validated], [tested] = (run(classifier, datamodule=data) for run in (trainer.validate, trainer.test))
    for stage, results, split in (("val", validated, data.source.val), ("test", tested, data.source.test)):
        logits, cross_entropy, accuracy = plain_results(classifier.network, split)
        expected = {f"{stage}/cross_entropy": cross_entropy, f"{stage}/accuracy": accuracy}
        assert results == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(torch.cat(trainer.predict(classifier, datamodule=data)), logits, atol=1e-6)


def test_metrics_of_steps_are_logged_at_each_step(config, tmp_path):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("mine", float(trainer.global_step), on_step=True)

    train(config("scheduler=linear"), callbacks=[Watch(), LearningRateMonitor("step")])
    scalars = events(tmp_path / "run")["scalars"]
    assert [(event.step, event.value) for event in scalars["mine"]] == [(step, step + 1) for step in range(10)]
    assert [event.step for event in scalars["lr-SGD"]] == list(range(10))
    assert [event.value for event in scalars["lr-SGD"]] == pytest.approx(rates)
    assert "test/accuracy" not in scalars  # `train` logs the results of the run as whole_run/…


def test_a_composed_run_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [compose("train", [*SMALL, "name=mine"]) for _ in range(2)]
    trainers = [build(one).trainer for one in configs]
    folders = {trainer.default_root_dir for trainer in trainers}
    assert len(folders) == 2
    assert {str(Path(folder).parent) for folder in folders} == {"lightning_logs/mine"}
    assert trainers[0].checkpoint_callback.dirpath.startswith(str(tmp_path / trainers[0].default_root_dir))
    assert not list(tmp_path.iterdir())  # it is created when training begins
    assert compose("train", [*SMALL, "output_dir=other"]).output_dir == "other"


class Dictionaries(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("images", "labels"), super().__getitem__(index), strict=True))


LOADERS = {
    "list": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=10),
    "dict": DataLoader(Dictionaries(IMAGES, LABELS), batch_size=10),
}


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("found", [*LOADERS])
def test_other_batches_are_refused(config, stage, found):
    trainer, classifier, *_ = build(config())
    expected = "DataLoader" if stage == "fit" else found
    with pytest.raises(UserError, match=rf"{expected}.*uint8.*InMemoryLoader"):
        getattr(trainer, stage)(classifier, LOADERS[found])


def test_float_images_in_memory_are_refused(config):
    trainer, classifier, *_ = build(config())
    with pytest.raises(UserError, match=r"float32 images.*torch\.uint8"):
        trainer.fit(classifier, InMemoryLoader(IMAGES, LABELS, 10, train=True))
