import sys
import textwrap
from pathlib import Path

import pytest
import torch

from cifarnet.allowlist import PACKAGE, allowed_class, class_path, locate, refuse_foreign_classes
from cifarnet.data import Synthetic
from cifarnet.errors import UserError
from cifarnet.models import CNN, SpeedNet

FILE = Path("run/checkpoints/best.ckpt")


@pytest.mark.parametrize(
    ("name", "package", "expected"),
    [
        ("cifarnet.models.CNN", "cifarnet.models", CNN),
        ("cifarnet.models.cnn.CNN", "cifarnet.models", CNN),
        ("cifarnet.models.speednet.SpeedNet", "cifarnet.models", SpeedNet),
        ("cifarnet.data.Synthetic", "cifarnet.data", Synthetic),
    ],
)
def test_classes_of_the_package_are_allowed(name, package, expected):
    assert allowed_class(name, package, FILE) is expected


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("os.mkdir", "cifarnet.models"),
        ("os.system", "cifarnet.models"),
        ("torch.load", "cifarnet.models"),
        ("torch.nn.Linear", "cifarnet.models"),
        ("cifarnet.train.train", "cifarnet.models"),
        ("cifarnet.models.cnn.F", "cifarnet.models"),  # a module that the file imports
        ("cifarnet.models.cnn.nn.Linear", "cifarnet.models"),
        ("cifarnet.models.cnn.Normalize.forward", "cifarnet.models"),
        ("cifarnet.models.construct", "cifarnet.models"),  # a function
        ("cifarnet.models.library.UserError", "cifarnet.models"),  # a class of another package
        ("cifarnet.models.library.partial", "cifarnet.models"),  # classes that a file merely imports
        ("cifarnet.models.construct.OrderedDict", "cifarnet.models"),
        ("cifarnet.models.cnn.Tensor", "cifarnet.models"),
        ("cifarnet.data.folder.Path", "cifarnet.data"),
        ("cifarnet.data.datamodule.Range", "cifarnet.data"),
        ("cifarnet.data.datamodule.L.LightningDataModule", "cifarnet.data"),
        ("cifarnet.models.CNN", "cifarnet.data"),
        ("cifarnet.data.Synthetic", "cifarnet.models"),
        ("cifarnet.models.nothing.Net", "cifarnet.models"),
        ("cifarnet.models.cnn.Nothing", "cifarnet.models"),
        ("cifarnet.models..cnn.CNN", "cifarnet.models"),
        ("cifarnet.models", "cifarnet.models"),
        ("CNN", "cifarnet.models"),
        ("", "cifarnet.models"),
        (None, "cifarnet.models"),
        ({"_target_": "os.mkdir"}, "cifarnet.models"),
    ],
)
def test_all_else_is_refused(name, package):
    with pytest.raises(UserError, match=rf"^{FILE} names the class .* not part of {package}.*classes=\["):
        allowed_class(name, package, FILE)


def test_a_new_file_in_the_models_folder_needs_no_registration():
    file = PACKAGE / "models" / "new_in_a_test.py"
    code = """
        from torch import nn
        from cifarnet.models.cnn import CNN

        class Mine(nn.Module):
            ...
    """
    try:
        file.write_text(textwrap.dedent(code))
        module = "cifarnet.models.new_in_a_test"
        assert allowed_class(f"{module}.Mine", "cifarnet.models", FILE).__name__ == "Mine"
        assert allowed_class(f"{module}.CNN", "cifarnet.models", FILE) is CNN  # of another file of the package
        with pytest.raises(UserError, match="names the class"):
            allowed_class(f"{module}.nn", "cifarnet.models", FILE)
    finally:
        file.unlink()


def test_the_user_can_allow_classes():
    classes = locate(["torch.nn.Linear"])
    for name in ("torch.nn.Linear", "torch.nn.modules.linear.Linear"):
        assert allowed_class(name, "cifarnet.models", FILE, classes) is torch.nn.Linear
    with pytest.raises(UserError, match=r"names the class torch\.nn\.Conv2d"):
        allowed_class("torch.nn.Conv2d", "cifarnet.models", FILE, classes)


class Linear:
    """Has the name of another class."""


def test_of_two_allowed_classes_with_one_name_the_recorded_module_decides():
    for classes in ([Linear, torch.nn.Linear], [torch.nn.Linear, Linear]):
        assert allowed_class("torch.nn.Linear", "cifarnet.models", FILE, classes) is torch.nn.Linear
        assert allowed_class(f"{__name__}.Linear", "cifarnet.models", FILE, classes) is Linear


def test_only_allowed_classes_are_used_whatever_module_a_file_names():
    assert allowed_class("evil.Linear", "cifarnet.models", FILE, [Linear]) is Linear  # `evil` is not imported


def test_an_unknown_class_in_the_command_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"classes=no\.such: there is no such class or function"):
        locate(["no.such"])
    with pytest.raises(UserError, match=r"classes=torch\.pi: there is no such class or function"):  # not a class
        locate(["torch.pi"])
    (tmp_path / "broken_module.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"classes=broken_module\.Net cannot be imported.*no_such_module"):
        locate(["broken_module.Net"])


def test_class_path_is_the_full_name():
    assert class_path(torch.nn.Linear) == "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"_target_": "evil.Net"}},
        {"callbacks": {"one": {"_target_": "lightning.pytorch.callbacks.Timer", "x": [{"_target_": "evil.Net"}]}}},
        {"data": {"transforms": ({"first": {"_target_": "evil.Net"}},)}},
        {"_target_": "cifarnet.models.CNN", "block": {"_target_": "evil.Net"}},
    ],
)
def test_foreign_classes_anywhere_in_a_config_are_refused_unless_allowed(config):
    with pytest.raises(UserError, match=rf"^{FILE} names the class evil\.Net\..*classes=\[evil\.Net\]"):
        refuse_foreign_classes(config, FILE)
    with pytest.raises(UserError, match=r"names the class evil\.Net"):
        refuse_foreign_classes(config, FILE, ["other.Net"])
    refuse_foreign_classes(config, FILE, ["evil.Net"])


@pytest.mark.parametrize(
    "name",
    [
        *("cifarnet.models.CNN", "cifarnet.data.ImageFolder", "cifarnet.classifier.Classifier"),
        *("cifarnet.callbacks.stopping.StopOnSignal", "cifarnet.recipes.distillation.Teacher"),
        *("cifarnet.optim.schedules.WarmupCosine", "cifarnet.optim.Muon", "hydra_plugins.cifarnet.Search"),
        *("optuna.samplers.TPESampler", "optuna.pruners.HyperbandPruner", "timm.optim.Lion", "torch.tensor"),
        *("torch.optim.SGD", "torch.optim.lr_scheduler.OneCycleLR", "torch.nn.functional.gelu", "torch.nn.LazyLinear"),
        *("torchvision.models.vgg11", "torchvision.models.ShuffleNetV2", "torchvision.transforms.v2.RandomCrop"),
        *("lightning.Trainer", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.callbacks.Timer"),
        *("lightning.pytorch.profilers.SimpleProfiler", "lightning.pytorch.callbacks.EMAWeightAveraging"),
    ],
)
def test_parts_of_a_run_are_not_foreign(name):
    refuse_foreign_classes({"parts": [{"_target_": name}]}, FILE)


@pytest.mark.parametrize(
    "name",
    [
        *("torchevil.Net", "torch.nosuch", "torch", "torch.${x}", "cifarnet.models"),
        *("torch.load", "torch.save", "torch.hub.load", "torch.hub.download_url_to_file", "torch.jit.load"),
        *("torch.utils.collect_env.run", "torch.multiprocessing.Process", "torch.distributed.TCPStore"),
        *("torch.utils.tensorboard.SummaryWriter", "torch.utils.cpp_extension.load", "torch.compile"),
        *("torchvision.datasets.CIFAR10", "torchvision.datasets.utils.download_url", "torchvision.io.write_file"),
        *("timm.create_model", "timm.models.load_checkpoint", "timm.models.hub.download_cached_file"),
        *("optuna.create_study", "optuna.storages.RDBStorage", "lightning.pytorch.cli.LightningCLI"),
        *("cifarnet.system.files.write", "cifarnet.train.train", "cifarnet.models.cnn.torch.load"),
        *("cifarnet.data.folder._save", "cifarnet.callbacks.loggers.shutil", "cifarnet.data.folder.os.mkdir"),
        *("cifarnet.models.library.partial", "cifarnet.data.folder.Path", "cifarnet.callbacks.loggers.Image"),
    ],
)
def test_functions_of_libraries_that_read_write_or_run_are_foreign(name):
    with pytest.raises(UserError, match=r"names the class .*classes=\["):
        refuse_foreign_classes({"parts": [{"_target_": name}]}, FILE)


def test_a_module_outside_the_libraries_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_in_a_test.py").write_text("from cifarnet.data import Synthetic\nfrom cifarnet.models import CNN")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil_in_a_test.Synthetic", "evil_in_a_test.CNN"):
        for section in ("model", "data"):
            with pytest.raises(UserError, match=rf"names .*{name}"):
                refuse_foreign_classes({section: {"_target_": name}}, FILE)
    assert "evil_in_a_test" not in sys.modules


def test_a_module_that_cannot_be_imported_is_foreign(tmp_path, monkeypatch):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/broken_in_a_test.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"names the class hydra_plugins\.broken_in_a_test\.Net"):
        refuse_foreign_classes({"_target_": "hydra_plugins.broken_in_a_test.Net"}, FILE)


def test_data_may_name_only_data_sets_recipes_and_transforms():
    allowed = ["cifarnet.data.CIFAR10", "cifarnet.recipes.mixup.Mixup", "torchvision.transforms.v2.RandomCrop"]
    section = {"_target_": allowed[0], "mix": {"_target_": allowed[1]}, "transforms": [{"_target_": allowed[2]}]}
    refuse_foreign_classes({"data": section}, FILE)
    refuse_foreign_classes({"data": None}, FILE)
    for name in (
        *("torchvision.models.resnet18", "torchvision.datasets.CIFAR10", "cifarnet.models.CNN", "torch.nn.Identity"),
        *("torchvision.transforms.functional.resize", "cifarnet.data.folder.Path", "cifarnet.data.nothing", "evil.Net"),
    ):
        with pytest.raises(UserError, match=rf"^{FILE} names the class {name}\..*classes=\[{name}\]"):
            refuse_foreign_classes({"data": section | {"x": {"_target_": name}}}, FILE)
        with pytest.raises(UserError, match=rf"names the class {name}"):
            refuse_foreign_classes({"data": {"x": {"_target_": name}}}, FILE, ["other.Net"])
        refuse_foreign_classes({"data": {"x": {"_target_": name}}}, FILE, [name])
