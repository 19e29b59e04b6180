import csv
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

import cifarnet
from cifarnet.build import build, make_trainer
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at

SETTINGS = ["callbacks=detailed", "callbacks.embeddings.count=30", "scheduler=constant"]


class Norms(Callback):
    """The norm of all gradients at each step, and the last gradient of the last layer."""

    def __init__(self) -> None:
        self.norms = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [parameter.grad.flatten() for parameter in module.network.parameters()]
        self.norms.append(torch.cat(gradients).square().sum().sqrt().item())
        self.last = module.network.head.weight.grad.clone()


@pytest.fixture(scope="module")
def detailed(tmp_path_factory):
    from conftest import small

    folder = tmp_path_factory.mktemp("detailed") / "run"
    norms = Norms()
    train(small(*SETTINGS, f"output_dir={folder}"), callbacks=[norms])
    file = min(folder.glob("events.*"), key=lambda file: int(file.suffix.removeprefix(".")))  # the first of the run's
    everything = {"histograms": 0, "tensors": 0, "scalars": 0}
    return folder, norms, EventAccumulator(str(file), everything).Reload()


def test_results_are_those_of_the_default_callbacks(detailed, config, tmp_path):
    folder, _, _ = detailed
    train(config("scheduler=constant"))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(folder / "checkpoints" / name, tmp_path / "run/checkpoints" / name)


def test_the_graph_contains_every_layer(detailed):
    folder, _, events = detailed
    layers = [name for name, layer in cifarnet.load(folder).network.named_modules() if not list(layer.children())]
    nodes = [node.name for node in events.Graph().node]  # such as CNN/Sequential[features]/Conv2d[0]/weight
    assert len(layers) > 10
    for layer in layers:
        assert any(all(f"[{part}]" in node for part in layer.split(".")) for node in nodes), layer


def test_histograms_are_those_of_the_weights_and_the_last_gradients(detailed):
    folder, norms, events = detailed
    weights = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["network.head.weight"]
    for group, values in {"weights": weights, "gradients": norms.last}.items():
        history = events.Histograms(f"{group}/head.weight")
        assert [event.step for event in history] == [1, 2]
        found = history[-1].histogram_value
        assert (found.num, found.min, found.max) == (values.numel(), values.min().item(), values.max().item())
        assert found.sum_squares == pytest.approx(values.double().square().sum().item())


def test_gradient_norms_are_logged_at_each_step(detailed):
    _, norms, events = detailed
    logged = events.Scalars("train/gradient_norm")
    assert [event.step for event in logged] == list(range(10))
    assert [event.value for event in logged] == pytest.approx(norms.norms)


def test_curves_count_the_test_images_above_each_threshold(detailed, config):
    folder, _, _ = detailed
    files = [EventAccumulator(str(file), {"tensors": 0}).Reload() for file in folder.glob("events.*")]
    data = build(config()).data
    network, class_names = cifarnet.load(folder)
    with torch.no_grad():
        probabilities = network(data.source.test.images).softmax(1)
    for number, name in enumerate(class_names):
        [file] = [file for file in files if f"whole_run/{name}" in file.Tags()["tensors"]]
        [event] = file.Tensors(f"whole_run/{name}")
        true_positives, false_positives, *_ = make_ndarray(event.tensor_proto)
        for index in (0, 5, 12, 20, 126):
            above = probabilities[:, number] * 126 >= index
            is_class = data.source.test.labels == number
            assert true_positives[index] == (above & is_class).sum()
            assert false_positives[index] == (above & ~is_class).sum()


def test_embeddings_are_the_inputs_of_the_last_layer(detailed):
    folder, _, _ = detailed
    network, class_names = cifarnet.load(folder)
    rows = list(csv.DictReader((folder / "00000/test/metadata.tsv").read_text().splitlines(), delimiter="\t"))
    values = [[float(value) for value in line.split("\t")] for line in (folder / "00000/test/tensors.tsv").open()]
    predicted = network.head(torch.tensor(values)).argmax(1)
    assert [row["predicted"] for row in rows] == [class_names[label] for label in predicted.tolist()]
    assert len(rows) == 30
    assert Image.open(folder / "00000/test/sprite.png").size == (6 * 32, 6 * 32)  # the smallest square for 30 images


@pytest.mark.parametrize("name", ["graph", "histograms", "gradient_norm", "pr_curves", "embeddings"])
def test_each_part_can_be_removed(config, name):
    def kinds(*settings):
        return {type(callback).__name__ for callback in make_trainer(config("callbacks=detailed", *settings)).callbacks}

    [removed] = kinds() - kinds(f"callbacks.{name}=null")
    assert removed.lower() == name.replace("_", "")


def test_a_network_that_cannot_be_traced(config, monkeypatch):
    def fail(*_):
        raise RuntimeError("no trace")

    monkeypatch.setattr(SummaryWriter, "add_graph", fail)
    with pytest.raises(UserError, match=r"callbacks\.graph.*no trace.*callbacks\.graph=null"):
        train(config("callbacks=detailed"))


def test_a_stopped_run_is_resumed_exactly(detailed, config, tmp_path):
    folder, _, _ = detailed
    with pytest.raises(Interrupted):
        train(config(*SETTINGS, signal_at(1, 1, signal.SIGTERM)))
    train(*resume(tmp_path / "run", [ALLOW_SIGNAL]))
    assert_same_weights(folder / "checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    assert (tmp_path / "run/00000/test/tensors.tsv").read_bytes() == (folder / "00000/test/tensors.tsv").read_bytes()
