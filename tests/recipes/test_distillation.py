import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

import cifarnet
from cifarnet.build import build
from cifarnet.config import validate
from cifarnet.errors import Interrupted, UserError
from cifarnet.evaluate import evaluate
from cifarnet.models import CNN
from cifarnet.recipes.distillation import Teacher
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, SMALL, CustomNetwork, assert_same_weights, signal_at, small, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a trained run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(small(f"output_dir={folder}", "model.widths=[8,8,8,8]", "optimizer.lr=0.05"))
    return folder


def taught(by: Path | str, *settings: str, recipes: str = "distillation") -> list[str]:
    return [f"+recipe=[{recipes}]", f"module.teacher.checkpoint={by}", *settings]


def test_losses_equal_those_by_hand():
    torch.manual_seed(0)
    recipe = Teacher("nowhere", temperature=3.0, weight=0.2)
    recipe.network = CNN(image_size=8, widths=(4, 4), hidden=8, drop_rate=0.5).eval()
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    losses, logits = torch.rand(5), torch.randn(5, 10, requires_grad=True)
    made = recipe(losses, logits, images)
    for image, loss, student, result in zip(images, losses, logits, made, strict=True):
        soft = Categorical(logits=recipe.network(image[None])[0] / 3)
        expected = 0.8 * loss + 0.2 * 9 * kl_divergence(soft, Categorical(logits=student / 3))
        torch.testing.assert_close(result, expected)
    made.sum().backward()
    assert logits.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in recipe.network.parameters())
    recipe.network.head.weight.data.zero_()
    recipe.network.head.bias.data.copy_(torch.arange(10.0))
    same = recipe(torch.zeros(5), torch.arange(10.0).expand(5, 10), images)
    torch.testing.assert_close(same, torch.zeros(5), rtol=0, atol=1e-5)


def test_with_a_weight_of_1_labels_have_no_effect(config, tmp_path, teacher):
    for objective in ("cross_entropy", "focal"):
        train(config(*taught(teacher, "module.teacher.weight=1", f"objective={objective}"), folder=objective))
    one, other = (tmp_path / name / "checkpoints/last.ckpt" for name in ("cross_entropy", "focal"))
    assert_same_weights(one, other)


def test_with_a_weight_of_0_the_teacher_has_no_effect(config, tmp_path, teacher):
    train(config(*taught(teacher, "module.teacher.weight=0"), folder="taught"))
    train(config(folder="alone"))
    assert_same_weights(tmp_path / "taught/checkpoints/last.ckpt", tmp_path / "alone/checkpoints/last.ckpt")
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text())["history"] for name in ("taught", "alone"))
    assert one == other


def test_resuming_a_student_needs_its_teacher_and_loading_does_not(config, tmp_path, teacher):
    copied = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    with pytest.raises(Interrupted):
        train(config(*taught(copied, signal_at(1, 2, signal.SIGINT))))
    copied.rename(tmp_path / "moved")
    cifarnet.load(tmp_path / "run")
    assert evaluate(tmp_path / "run", ["corruptions=false"])["network"] == "CNN"
    with pytest.raises(UserError, match=r"/teacher: no checkpoint found"):
        train(*resume(tmp_path / "run", [ALLOW_SIGNAL]))
    (tmp_path / "moved").rename(copied)
    train(*resume(tmp_path / "run", [ALLOW_SIGNAL]))


def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, teacher, monkeypatch):
    """The teacher's path is relative to the working directory."""
    monkeypatch.chdir(teacher.parent)
    settings = taught("run", "model.drop_rate=0.2", "data.hardest_share=0.8", recipes="distillation,mixup,ema")
    train(config(*settings, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*settings, signal_at(1, 2, signal.SIGINT), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(tmp_path / "whole/checkpoints" / name, tmp_path / "parts/checkpoints" / name)
    assert {name.partition(".")[0] for name in weights(tmp_path / "parts/checkpoints/last.ckpt")} == {"network"}


def test_the_teacher_sees_mixed_images(config, teacher, monkeypatch):
    seen = []
    before = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, *of: seen.append(of[2]) or before(self, *of))
    plain = ["trainer.max_epochs=1", "scheduler=constant", "data.crop_padding=0", "data.flip=none"]
    made = config(*taught(teacher, *plain, recipes="distillation,mixup"))
    train(made)
    images = {image.numpy().tobytes() for image in build(made).data.source.train.images}
    assert any(image.contiguous().numpy().tobytes() not in images for image in torch.cat(seen))


def altered(run: Path, folder: Path, change) -> Path:
    """Save a copy of a checkpoint whose content was changed."""
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    change(content)
    torch.save(content, folder / "altered.ckpt")
    return folder / "altered.ckpt"


def hparams(**changed):
    return lambda content: content["hyper_parameters"].update(changed)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, ["module.teacher.checkpoint=nowhere"], r"nowhere: no checkpoint found"),
        (hparams(image_size=24), [], r"The images are 32 pixels wide; the teacher .* 24"),
        (
            lambda content: content["hyper_parameters"]["class_names"].reverse(),
            [],
            r"The data has the classes disc, .*; the teacher .*, disc\.",
        ),
        (hparams(extra=nn.Linear(1, 1)), [], r"altered\.ckpt is not a readable cifarnet checkpoint"),
        (hparams(model={"_target_": "os.mkdir", "path": "x"}), [], r"altered\.ckpt names the class os\.mkdir"),
    ],
)
def test_an_unsuitable_teacher_is_refused_in_one_line(command, tmp_path, teacher, change, settings, message):
    by = altered(teacher, tmp_path, change) if change else teacher
    status, _, error = command(*SMALL, *taught(by), *settings)
    assert status == 1
    assert re.fullmatch(rf"Error: .*{message}.*\n", error), error


def test_a_teacher_is_required(config):
    with pytest.raises(UserError, match=r"module\.teacher\.checkpoint"):
        validate(config("+recipe=distillation"))


def test_a_foreign_network_teaches_if_it_is_allowed(config, tmp_path):
    train(config("~model", "+model={_target_: conftest.CustomNetwork}", without="model", folder="own"))
    with pytest.raises(UserError, match=r"names the class conftest\.CustomNetwork"):
        build(config(*taught(tmp_path / "own")))
    built = build(config(*taught(tmp_path / "own"), "classes=[conftest.CustomNetwork]"))
    assert isinstance(built.classifier.teacher.network, CustomNetwork)
    with pytest.raises(UserError, match=r"the teacher .*/best.ckpt fails on a 24×24 input"):
        build(config(*taught(tmp_path / "own"), "classes=[conftest.CustomNetwork]", "data.train_sizes=[24]"))


def test_a_recorded_teacher_is_read_as_a_checkpoint(teacher, tmp_path, monkeypatch):
    """A plain pickle.load of the file would run code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Explodes(tmp_path / "exploded")))
    recorded = {"_target_": "cifarnet.recipes.distillation.Teacher", "checkpoint": str(tmp_path / "evil.ckpt")}
    path = altered(teacher, tmp_path, lambda c: c["hyper_parameters"]["config"]["module"].update(teacher=recorded))
    with pytest.raises(UserError, match=r"evil\.ckpt is not a readable cifarnet checkpoint"):
        train(*resume(path))
    assert not (tmp_path / "exploded").exists()


class Explodes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_two_ranks_train_like_one(config, tmp_path, teacher):
    train(config("threads=1", *taught(teacher), folder="one"))
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    train(config(*taught(teacher), *two, folder="two", without="trainer=cpu"))
    one, other = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
