import sys
import textwrap

import pytest
import timm.optim
import torch

from cifarnet.allowlist import PACKAGE, locate, permitted
from cifarnet.data import Synthetic
from cifarnet.errors import UserError
from cifarnet.models import CNN, SpeedNet
from cifarnet.recipes.distillation import Teacher


@pytest.mark.parametrize(
    ("name", "room", "expected"),
    [
        ("cifarnet.models.CNN", "model", CNN),
        ("cifarnet.models.cnn.CNN", "model", CNN),
        ("cifarnet.models.speednet.SpeedNet", "model", SpeedNet),
        ("cifarnet.data.Synthetic", "data", Synthetic),
        ("torch.optim.SGD", "optimizer", torch.optim.SGD),
        ("cifarnet.recipes.distillation.Teacher", "module", Teacher),
        ("torch.optim.lr_scheduler.OneCycleLR", "scheduler", torch.optim.lr_scheduler.OneCycleLR),
        ("torch.nn.CrossEntropyLoss", "objective", torch.nn.CrossEntropyLoss),
        ("timm.optim.Lion", "optimizer", timm.optim.Lion),
    ],
)
def test_what_is_listed_or_lies_in_its_place(name, room, expected):
    assert permitted(name, room) is expected


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("os.mkdir", "model"),
        ("cifarnet.models.cnn.F", "model"),  # a module that the file imports
        ("cifarnet.models.cnn.nn.Linear", "model"),
        ("cifarnet.models.construct", "model"),  # no class
        ("cifarnet.models.CNN", "data"),
        ("cifarnet.data.Synthetic", "model"),
        ("cifarnet.models.nothing.Net", "model"),
        ("cifarnet.models..cnn.CNN", "model"),
        ("torch.nn.Linear", "model"),
        ("torch.optim.os", "optimizer"),
        ("timm.optim.create_optimizer_v2", "optimizer"),
        ("torch.optim.SGD", "model"),
        ("cifarnet.recipes.ema.EMA", "module"),
        ("torch.load", "optimizer"),
        (None, "model"),
        ({"_target_": "os.mkdir"}, "model"),
        ("cifarnet.models.CNN", "elsewhere"),
    ],
)
def test_nothing_else(name, room):
    assert permitted(name, room) is None


def test_what_needs_a_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(UserError, match=r"needs timm: pip install 'cifarnet\[timm\]'"):
        permitted("timm.optim.Lion", "optimizer")


def test_a_new_file_in_the_models_folder_is_enough():
    file = PACKAGE / "models" / "of_a_test.py"
    code = """
        from torch import nn
        from cifarnet.models.cnn import CNN

        class Mine(nn.Module):
            ...

        class NotOne:
            ...
    """
    try:
        file.write_text(textwrap.dedent(code))
        assert permitted("cifarnet.models.of_a_test.Mine", "model").__name__ == "Mine"
        assert permitted("cifarnet.models.of_a_test.NotOne", "model") is None
        assert permitted("cifarnet.models.of_a_test.CNN", "model") is CNN  # another file's, but one of this folder
    finally:
        file.unlink()


def test_the_user_may_allow_more():
    classes = locate(["torch.nn.Linear"])
    assert permitted("torch.nn.Linear", "model", classes) is torch.nn.Linear
    assert permitted("torch.nn.modules.linear.Linear", "model", classes) is torch.nn.Linear
    assert permitted("torch.nn.Conv2d", "model", classes) is None
    with pytest.raises(UserError, match=r"there is no class no.such. Give it as classes=\[module.Class\]"):
        locate(["no.such"])
