import csv
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import cifarnet
from cifarnet.build import build, make_trainer
from cifarnet.callbacks.detailed import Embeddings, Graph
from cifarnet.config import validate
from cifarnet.errors import Interrupted, UserError
from cifarnet.models import Normalize, construct
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


def test_embeddings_are_the_inputs_of_the_last_layer(detailed, config):
    folder, _, _ = detailed
    network, class_names = cifarnet.load(folder)
    rows = list(csv.DictReader((folder / "00000/test/metadata.tsv").read_text().splitlines(), delimiter="\t"))
    values = torch.tensor(
        [[float(value) for value in line.split("\t")] for line in (folder / "00000/test/tensors.tsv").open()]
    )
    predicted = network.head(values).argmax(1)
    assert [row["predicted"] for row in rows] == [class_names[label] for label in predicted.tolist()]
    assert len(rows) == 30
    sprites = np.array(Image.open(folder / "00000/test/sprite.png"))
    assert sprites.shape == (6 * 32, 6 * 32, 3)  # the smallest square for 30 images
    # the image of each sprite has the class and the embedding of its row
    test = build(config()).data.source.test
    inputs = network.head.register_forward_pre_hook(lambda _, arguments: (embeddings.append(arguments[0]), None)[1])
    embeddings: list[torch.Tensor] = []
    with torch.no_grad():
        network(test.images)
    inputs.remove()
    for number, row in enumerate(rows):
        top, left = 32 * (number // 6), 32 * (number % 6)
        sprite = torch.from_numpy(sprites[top : top + 32, left : left + 32]).permute(2, 0, 1)
        difference = (test.images.int() - sprite).abs().flatten(1).amax(1)
        position = int(difference.argmin())
        assert difference[position] <= 1
        assert row["class"] == class_names[test.labels[position]]
        assert torch.allclose(embeddings[0][position], values[number], atol=1e-5)


def test_embeddings_show_the_predictions_of_the_test(config, tmp_path):
    trainer, classifier, data, _ = build(config(*SETTINGS, "callbacks.graph=null"))
    trainer.fit(classifier, datamodule=data)
    trainer.test(classifier, datamodule=data, verbose=False)
    classifier.test_logits = classifier.test_logits.roll(1, 1)  # test-time augmentation can change the predictions
    Embeddings(len(data.source.test)).draw(trainer, classifier)
    lines = (tmp_path / "run/00000/test/metadata.tsv").read_text().splitlines()[1:]
    tested = [data.class_names[label] for label in classifier.test_logits.argmax(1).tolist()]
    assert sorted(line.split("\t")[1] for line in lines) == sorted(tested)


@pytest.mark.parametrize("name", ["graph", "histograms", "gradient_norm", "pr_curves", "embeddings"])
def test_each_part_can_be_removed(config, name):
    def kinds(*settings):
        return {type(callback).__name__ for callback in make_trainer(config("callbacks=detailed", *settings)).callbacks}

    [removed] = kinds() - kinds(f"callbacks.{name}=null")
    assert removed.lower() == name.replace("_", "")


@pytest.mark.parametrize("error", [RuntimeError("no trace"), torch.jit.TracingCheckError("no trace", "")])
def test_a_network_that_cannot_be_traced(config, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(SummaryWriter, "add_graph", fail)
    with pytest.raises(UserError, match=r"callbacks\.graph.*no trace.*callbacks\.graph=null"):
        train(config("callbacks=detailed"))


@pytest.mark.parametrize("name", ["resnet20", "vit", "densenet", "mobilenetv2"])
def test_the_graph_of_other_networks(config, tmp_path, name):
    model = construct(instantiate(config(f"model={name}", without="model.").model, _partial_=True), 10, 32)
    layers = [name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")]
    with SummaryWriter(tmp_path) as writer:
        trainer = SimpleNamespace(loggers=[TensorBoardLogger(tmp_path)], global_step=0)
        trainer.loggers[0]._experiment = writer
        batch = SimpleNamespace(images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        Graph().on_train_batch_start(trainer, SimpleNamespace(network=model), batch, 0)
    nodes = [node.name for node in EventAccumulator(str(tmp_path)).Reload().Graph().node]
    for layer in layers:
        assert any(all(f"[{part}]" in node for part in layer.split(".")) for node in nodes), layer


def test_loaders_of_their_own_work(config):
    trainer, classifier, data, _ = build(config(*SETTINGS))
    trainer.fit(classifier, data.train_dataloader(), data.val_dataloader())
    assert trainer.global_step == 10


class Scaler(Callback):
    """Scales the gradients as float16 does, which a CPU run lacks."""

    def on_fit_start(self, trainer, module):
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_float16_are_shown_without_their_scale(config, tmp_path, fused):
    settings = [*SETTINGS, "callbacks.graph=null", "trainer.precision=bf16-mixed", f"optimizer.fused={fused}"]
    shown = []
    for name, more in {"plain": [], "scaled": [Scaler()]}.items():
        train(config(*settings, "trainer.max_epochs=1", folder=name), callbacks=more)
        file = min((tmp_path / name).glob("events.*"), key=lambda file: int(file.suffix.removeprefix(".")))
        found = EventAccumulator(str(file), {"histograms": 0, "scalars": 0}).Reload()
        norms = [event.value for event in found.Scalars("train/gradient_norm")]
        shown.append([*norms, found.Histograms("gradients/head.weight")[0].histogram_value.max])
    assert shown[1] == pytest.approx(shown[0], rel=1e-3)


@pytest.mark.parametrize("setting", ["callbacks.embeddings.count=0", "+callbacks.pictures.count=0"])
def test_a_count_of_zero_is_refused(config, setting):
    with pytest.raises(UserError, match=setting.lstrip("+")):
        validate(config("callbacks=detailed", setting))


def test_a_network_without_a_head_is_refused_before_training(config):
    parts = build(config(*SETTINGS))
    parts.classifier.network = nn.Sequential(Normalize(), nn.Flatten(), nn.LazyBatchNorm1d())
    with pytest.raises(UserError, match=r"could be its head.*callbacks\.embeddings"):
        parts.trainer.fit(parts.classifier, datamodule=parts.data)
    assert parts.trainer.global_step == 0


def test_a_stopped_run_is_resumed_exactly(detailed, config, tmp_path):
    folder, _, _ = detailed
    with pytest.raises(Interrupted):
        train(config(*SETTINGS, signal_at(1, 1, signal.SIGTERM)))
    train(*resume(tmp_path / "run", [ALLOW_SIGNAL]))
    assert_same_weights(folder / "checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    assert (tmp_path / "run/00000/test/tensors.tsv").read_bytes() == (folder / "00000/test/tensors.tsv").read_bytes()
