import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from cifarnet.build import build
from cifarnet.callbacks import compilation
from cifarnet.callbacks.compilation import Compile, warm_up
from cifarnet.checkpoint import Checkpoint
from cifarnet.classifier import Classifier
from cifarnet.errors import UserError
from cifarnet.train import train


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["true", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_compiling_does_not_change_the_names_of_weights(config, tmp_path, mode):
    train(config(f"compile={mode}"))
    assert not any("_orig_mod" in name for name in Checkpoint.open(tmp_path / "run").weights)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["compile_seconds"] > 0


class CountGraphs(Callback):
    """Counts the graphs that were compiled before training, and until its last batch."""

    def on_train_start(self, trainer, module):
        self.before = counters["stats"]["unique_graphs"]

    def on_train_batch_end(self, *_):
        self.after = counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_every_size_is_compiled_before_training(config):
    count, sizes = CountGraphs(), "data.train_sizes=[8,12,16]"
    train(config("compile=true", "callbacks=lean", sizes, "trainer.max_epochs=4"), callbacks=[count])
    assert count.after == count.before > 1


def test_compiling_without_a_compiler_is_reported(config, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match=r"no working C\+\+ compiler.*compile=false"):
        train(config("compile=true"))


def start_compilation(monkeypatch, error: Exception) -> None:
    """Start training with a network whose compilation raises an error."""

    def fail(*_):
        raise error

    monkeypatch.setattr(compilation, "warm_up", fail)
    Compile().on_train_start(SimpleNamespace(), Classifier(nn.Flatten(), torch.optim.SGD))


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("backend failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        InvalidCxxCompiler(),
        InductorError(InvalidCxxCompiler(), None),
        caused_by(CppCompileError(["g++"], "no such file")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_missing_compiler_is_found_among_the_causes_of_an_error(monkeypatch, error):
    with pytest.raises(UserError, match=r"no working C\+\+ compiler.*compile=false"):
        start_compilation(monkeypatch, error)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError])
def test_other_errors_of_a_compiled_network_are_not_taken_for_a_missing_compiler(monkeypatch, kind):
    error = kind("the compiler got shapes [1, 2] and [3, 4]: g++, C++, CppCompileError")
    with pytest.raises(kind) as raised:
        start_compilation(monkeypatch, error)
    assert raised.value is error


def test_warming_up_changes_nothing(config):
    """Neither weights, statistics and gradients nor random generators."""
    built = build(config("model=speednet", "model.widths=[8,8,8]", "data.train_sizes=[16,24]", without="model"))
    network = built.classifier.network
    seen = []
    handle = network.register_forward_pre_hook(lambda _, images: seen.append(images[0].shape))
    built.trainer.datamodule = built.data
    loader = built.data.train_dataloader()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    network.train()
    trainer = SimpleNamespace(
        train_dataloader=loader, datamodule=built.data, precision_plugin=built.trainer.precision_plugin
    )
    warm_up(trainer, built.classifier)
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(32, 3, 16, 16), (32, 3, 24, 24)]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
