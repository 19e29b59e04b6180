import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cifarnet import __version__
from cifarnet.checkpoint import HUB_SETTINGS, HUB_WEIGHTS, Checkpoint, checkpoint_path
from cifarnet.errors import UserError
from cifarnet.models import Normalize, SpeedNet, construct
from cifarnet.models.convmixer import ConvMixer
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import CustomNetwork

LIBRARY = {
    "_target_": "cifarnet.models.library.LibraryModel",
    "library": "torchvision",
    "name": "shufflenet_v2_x0_5",
}


class FloatNetwork(nn.Module):
    """Takes only floats, and neither a number of classes nor an image size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32**2, 10)

    def forward(self, images):
        assert images.dtype == torch.float32
        return self.head(images.flatten(1))


def alter_settings(**settings):
    """Return a function that replaces what a checkpoint's hyperparameters hold; None removes it."""

    def alter(content):
        content["hyper_parameters"] |= settings
        for name in [name for name, value in settings.items() if value is None]:
            del content["hyper_parameters"][name]

    return alter


def alter_model(**arguments):
    """Return a function that replaces arguments of a checkpoint's network."""
    return lambda content: content["hyper_parameters"]["model"].update(arguments)


def test_a_checkpoint_holds_what_loading_needs(run):
    checkpoint = Checkpoint.open(run)
    assert checkpoint.path == run / "checkpoints/best.ckpt"
    assert (checkpoint.version, checkpoint.epoch, checkpoint.step) == (__version__, 1, 5)
    assert (len(checkpoint.class_names), checkpoint.image_size) == (10, 32)
    assert checkpoint.model["_target_"] == "cifarnet.models.SpeedNet"
    assert checkpoint.model["widths"] == [8, 8, 8]
    assert (checkpoint.tta, checkpoint.tta_share) == ("mirror", 0.3)
    assert (checkpoint.precision, checkpoint.channels_last) == ("32-true", True)
    assert checkpoint.network_name == "SpeedNet"
    network = checkpoint.network()
    assert isinstance(network, SpeedNet)
    assert not network.training
    saved = torch.load(checkpoint.path, weights_only=True)["state_dict"]
    assert {f"network.{name}" for name in network.state_dict()} == saved.keys()
    assert all(torch.equal(value, saved[f"network.{name}"]) for name, value in network.state_dict().items())


def test_a_run_without_validation_has_its_last_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert checkpoint_path(tmp_path) == tmp_path / "checkpoints/last.ckpt"
    (tmp_path / "checkpoints/best.ckpt").touch()
    assert checkpoint_path(tmp_path) == tmp_path / "checkpoints/best.ckpt"


def test_commands_write_into_the_run_or_beside_the_file(run, tmp_path):
    checkpoint = Checkpoint.open(run)
    assert checkpoint.run_folder == run
    assert checkpoint.folder_for("exported") == run / "exported"
    (tmp_path / "copy.ckpt").write_bytes(checkpoint.path.read_bytes())
    copy = Checkpoint.open(tmp_path / "copy.ckpt")
    assert copy.run_folder is None
    assert copy.folder_for("exported") == tmp_path / "copy_exported"


def test_a_folder_that_is_a_link_out_of_the_run_is_refused(run, tmp_path):
    (run / "predictions").symlink_to(tmp_path)
    try:
        with pytest.raises(UserError, match=r"predictions is a link to a place outside"):
            Checkpoint.open(run).folder_for("predictions")
        assert Checkpoint.open(run).folder_for("exported") == run / "exported"
    finally:
        (run / "predictions").unlink()


def test_a_custom_network_must_be_allowed(config, tmp_path):
    train(config("~model", "+model={_target_: conftest.CustomNetwork}", without="model"))
    checkpoint = Checkpoint.open(tmp_path / "run")
    with pytest.raises(UserError, match=r"best\.ckpt names the class conftest\.CustomNetwork, .*classes=\["):
        checkpoint.network()
    network = checkpoint.network(classes=[CustomNetwork])
    assert network.layers[0].std.max() < 1  # the statistics of the training images


def test_a_network_without_normalize_gets_one_in_front(config, tmp_path):
    train(config("~model", f"+model={{_target_: {__name__}.FloatNetwork}}", without="model"))
    network = Checkpoint.open(tmp_path / "run").network(classes=[FloatNetwork])
    assert isinstance(network.normalize, Normalize)
    assert network.normalize.std.max() < 1
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_a_network_of_torchvision_is_trained_resumed_and_loaded(config, tmp_path):
    import torchvision

    small = "{_target_: torchvision.models.ShuffleNetV2, stages_repeats: [1,1,1], stages_out_channels: [4,8,8,8,8]}"
    train(config("~model", f"+model={small}", "scheduler=constant", "trainer.max_epochs=1", without="model"))
    train(*resume(tmp_path / "run", ["trainer.max_epochs=2"]))
    checkpoint = Checkpoint.open(tmp_path / "run")
    with pytest.raises(UserError, match=r"names the class torchvision\.models\.ShuffleNetV2"):
        checkpoint.network()
    network = checkpoint.network(classes=[torchvision.models.ShuffleNetV2])
    assert isinstance(network.network, torchvision.models.ShuffleNetV2)
    assert network.network.fc.out_features == 10


def test_hyperparameters_are_recorded_resolved_and_the_config_as_written(run):
    hparams = Checkpoint.open(run).content["hyper_parameters"]
    assert hparams["config"]["data"]["shuffle_seed"] == "${seed}"
    assert hparams["data"]["shuffle_seed"] == 0
    assert hparams["num_images"] == 270
    assert hparams.keys() == {
        *("cifarnet", "class_names", "image_size", "num_images", "files_sha256", "model", "data"),
        *("tta", "tta_share", "precision", "channels_last", "config"),
    }


def test_no_path_and_no_url_is_taken_from_a_file(changed):
    data = {"_target_": "cifarnet.data.CIFAR10", "root": "/etc", "url": "http://127.0.0.1", "path": "x", "mix": {}}
    checkpoint = Checkpoint.open(changed(alter_settings(data=data | {"val_fraction": 0.1, "split_seed": 3})))
    assert checkpoint.data == {"_target_": "cifarnet.data.CIFAR10", "val_fraction": 0.1, "split_seed": 3}


def test_the_file_that_training_started_from_is_not_read(changed):
    checkpoint = Checkpoint.open(changed(alter_settings(model=LIBRARY | {"checkpoint": "/etc/passwd"})))
    assert checkpoint.network_name == "LibraryModel shufflenet_v2_x0_5"
    make, arguments = checkpoint.architecture()
    assert {"_target_": f"{make.__module__}.{make.__name__}"} | arguments == LIBRARY | {"checkpoint": None}


def test_a_missing_checkpoint_is_reported_with_a_run_nearby(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/a\.ckpt: no checkpoint found\. Specify a run's folder"):
        Checkpoint.open(tmp_path / "a.ckpt")
    for name, time in [("first", 1), ("latest", 3), ("second", 2)]:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        os.utime(tmp_path / name / "checkpoints", (time, time))
    for path in (tmp_path, tmp_path / "checkpoints/best.ckpt"):
        with pytest.raises(UserError, match=rf"no checkpoint found\. Did you mean {tmp_path}/latest\?"):
            Checkpoint.open(path)


def truncate(content: bytes) -> bytes:
    return content[:5000]


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2  # in the weights
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "zip"), (flip_bit, "checksum of .* is wrong"), (lambda _: b"", "zip"), (lambda _: b"onnx", "zip")],
    ids=["truncated", "flipped", "empty", "another format"],
)
def test_a_damaged_file_is_refused(run, tmp_path, damage, reason):
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damage((run / "checkpoints/best.ckpt").read_bytes()))
    with pytest.raises(UserError, match=rf"{path} is not a readable cifarnet checkpoint: .*{reason}"):
        Checkpoint.open(path)


def test_a_file_with_code_is_refused(changed, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # changes only the default of torch.load
    path = changed(alter_settings(extra=nn.Linear(1, 1)))
    with pytest.raises(UserError, match=rf"{path} is not a readable cifarnet checkpoint"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "alter",
    [
        lambda content: content.update(state_dict=None),
        lambda content: content.update(state_dict={"network.weight": 3}),
        lambda content: content.update(epoch="one"),
        lambda content: content.update(global_step=[]),
        lambda content: content.update(hyper_parameters="text"),
        lambda content: content.pop("hyper_parameters"),
        alter_settings(model=None),
        alter_settings(model="cifarnet.models.CNN"),
        alter_settings(class_names=None),
        alter_settings(class_names=3),
        alter_settings(class_names=[1, 2]),
        alter_settings(image_size="32"),
        alter_settings(image_size=10**9),
        alter_settings(tta="sideways"),
        alter_settings(tta_share=2.0),
        alter_settings(precision=32),
        alter_settings(channels_last="no"),
        alter_settings(data=[1]),
        alter_settings(cifarnet=None),
        alter_settings(cifarnet="newest"),
    ],
)
def test_wrong_types_are_refused_with_the_name_of_the_file(changed, alter):
    path = changed(alter)
    with pytest.raises(UserError, match=rf"^{path}") as refusal:
        Checkpoint.open(path)
    assert len(str(refusal.value)) < 500


def test_a_file_of_a_newer_version_is_refused(changed):
    path = changed(alter_settings(cifarnet="99.0"))
    with pytest.raises(UserError, match=rf"{path} was written by cifarnet 99\.0, .*{__version__}.* update"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "cifarnet.train.train", "cifarnet.models.cnn.torch.load", {}, None]
)
def test_a_class_that_is_not_a_network_of_this_project_is_refused(changed, target):
    model = {"_target_": target, "command": "touch exploded", "f": "evil.pt"}
    checkpoint = Checkpoint.open(changed(alter_settings(model=model)))
    with pytest.raises(UserError, match=r"changed\.ckpt names the class .*classes=\["):
        checkpoint.network()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"widths": {"_target_": "os.mkdir", "path": "exploded"}}, r"model\.widths=.* plain data"),
        ({"widths": [{"_target_": "os.mkdir", "path": "exploded"}]}, r"model\.widths=.* plain data"),
        ({"widths": ["${oc.env:HOME}"]}, r"model\.widths=.* plain data"),
        ({"widths": b"8"}, r"model\.widths=.* plain data"),
        ({"widths": "888"}, r"model\.widths=888 is not valid"),
        ({"widths": [0, 8, 8]}, r"model\.widths=\[0, 8, 8\] is out of range"),
        ({"depth": 3}, r"has no argument depth"),
        ({"_target_": "cifarnet.models.tta.AveragedLogits"}, ""),
    ],
    ids=lambda value: str(value)[:50],
)
def test_arguments_that_the_class_does_not_take_are_refused(changed, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint.open(changed(alter_model(**arguments)))
    with pytest.raises(UserError, match=rf"changed\.ckpt: .*{reason}"):
        checkpoint.network()
    assert not Path("exploded").exists()


def test_nested_classes_in_free_arguments_are_refused(changed):
    """LibraryModel passes any further argument on to the library."""
    for extra in ({"_target_": "os.mkdir"}, {"x": {"_target_": "os.mkdir"}}, {"x": [{"_partial_": True}]}):
        checkpoint = Checkpoint.open(changed(alter_settings(model=LIBRARY | {"extra": extra})))
        with pytest.raises(UserError, match=r"model\.extra=.* plain data"):
            checkpoint.network()
    checkpoint = Checkpoint.open(changed(alter_settings(model=LIBRARY | {"extra": {"x": [{"y": 1}]}})))
    assert checkpoint.architecture()[1]["extra"] == {"x": [{"y": 1}]}


def test_sizes_that_do_not_fit_the_weights_take_no_memory(changed, monkeypatch):
    checkpoint = Checkpoint.open(changed(alter_model(widths=[65536, 65536, 65536])))  # 155 GB a layer
    with pytest.raises(UserError, match=r"weights in .*changed\.ckpt do not fit the network"):
        checkpoint.network()
    assert isinstance(Checkpoint.open(changed(alter_model(widths=[8, 8, 8]))).network(), SpeedNet)


@pytest.mark.filterwarnings("ignore:.*parse")
@pytest.mark.parametrize("size", [(65536, 65536, 3, 3), (8,)])
@pytest.mark.parametrize("kind", ["expanded", "meta", "sparse"])
def test_weights_without_values_are_refused(changed, kind, size):
    """A small file could claim weights of any size, and thereby a network of that size."""
    weight = {
        "expanded": lambda: torch.zeros(1).expand(size),
        "meta": lambda: torch.zeros(size, device="meta"),
        "sparse": lambda: torch.sparse_coo_tensor(size=size),
    }[kind]()
    path = changed(lambda content: content["state_dict"].update({"network.weight": weight}))
    with pytest.raises(UserError, match=rf"{path} is not a readable cifarnet checkpoint"):
        Checkpoint.open(path)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_other_weights_are_refused(changed, change):
    def alter(content):
        weights = content["state_dict"]
        name = next(iter(weights))
        value = weights[name] if change == "unknown" else weights.pop(name)
        weights |= {"missing": {}, "unknown": {"network.more": value}, "shape": {name: value[:1]}}[change]

    checkpoint = Checkpoint.open(changed(alter))
    with pytest.raises(UserError, match=r"weights in .*changed\.ckpt do not fit the network"):
        checkpoint.network()


def test_a_hub_folder_is_a_checkpoint_without_training_state(run, tmp_path):
    folder = tmp_path / "hub.v2"
    folder.mkdir()
    recorded = Checkpoint.open(run)
    names = ("class_names", "image_size", "model", "tta", "precision")
    settings = {name: getattr(recorded, name) for name in names} | {"cifarnet": __version__, "epoch": 7}
    (folder / HUB_SETTINGS).write_text(json.dumps(settings))
    weights = {f"network.{name}": value.contiguous() for name, value in recorded.weights.items()}
    save_file(weights, folder / HUB_WEIGHTS)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.folder_for("exported") == tmp_path / "hub.v2_exported"
    assert checkpoint.sha256() == hashlib.sha256((folder / HUB_WEIGHTS).read_bytes()).hexdigest()
    assert (checkpoint.epoch, checkpoint.step, checkpoint.content) == (7, 0, {})
    assert (checkpoint.data, checkpoint.tta_share, checkpoint.channels_last) == ({}, 1.0, True)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(checkpoint.network()(images), recorded.network()(images))
    with pytest.raises(UserError, match=r"contains no training state: use .*model\.checkpoint="):
        resume(folder)
    (folder / HUB_SETTINGS).write_text(json.dumps(settings | {"image_size": "large"}))
    with pytest.raises(UserError, match=rf"^{folder}: image_size=large"):
        Checkpoint.open(folder)
    (folder / HUB_SETTINGS).write_text("{")
    with pytest.raises(UserError, match=rf"{folder}/config\.json cannot be read"):
        Checkpoint.open(folder)


def test_class_names_are_compared_in_any_unicode_form(changed):
    names = ["cafe\u0301", *"bcdefghij"]
    composed = ["caf\u00e9", *"bcdefghij"]

    def alter(content):
        content["hyper_parameters"].update(class_names=names)

    checkpoint = Checkpoint.open(changed(alter))
    checkpoint.check_task(composed, 32)
    checkpoint.check_images(checkpoint.content["hyper_parameters"] | {"class_names": composed})
    for other in (["cafe", *composed[1:]], composed[1:], [*composed, ""], []):
        with pytest.raises(UserError, match="trained on"):
            checkpoint.check_task(other, 32)
        with pytest.raises(UserError, match="class_names was"):
            checkpoint.check_images(checkpoint.content["hyper_parameters"] | {"class_names": other})


def test_data_for_another_task_are_refused(run):
    checkpoint = Checkpoint.open(run)
    names = checkpoint.class_names
    checkpoint.check_task(names, 32)
    message = rf"The data has the classes a, b; the teacher was trained on {', '.join(names)}\. Use data"
    with pytest.raises(UserError, match=message):
        checkpoint.check_task(["a", "b"], 32, "the teacher")
    with pytest.raises(UserError, match=r"images are 24 pixels wide; the teacher was trained on"):
        checkpoint.check_task(names, 24, "the teacher")
    with pytest.raises(UserError, match=r"trained on"):
        checkpoint.check_task(names[::-1], 32)
    with pytest.raises(
        UserError, match=r"images are 24 pixels wide; the network was trained on images of 32 .*image_size=32"
    ):
        checkpoint.check_task(names, 24)


@pytest.mark.parametrize("file", ["metrics.json", "train.log", ".hydra/config.yaml", ".lock", None])
def test_a_folder_is_a_run_if_it_has_a_file_of_a_run(run, tmp_path, file):
    (tmp_path / "home/checkpoints").mkdir(parents=True)
    path = tmp_path / "home/checkpoints/x.ckpt"
    path.write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    if file is not None:
        (tmp_path / "home" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "home" / file).touch()
    expected = path.parent / "x_explained" if file is None else tmp_path / "home/explained"
    assert Checkpoint.open(path).folder_for("explained") == expected


class Deep(nn.Module):
    """A network that cannot be built on the meta device."""

    def __init__(self, depth: int = 1, width: int = 8, drops: int = 0) -> None:
        super().__init__()
        torch.zeros(1).tolist()
        self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
        self.drops = nn.ModuleList(nn.Dropout() for _ in range(drops))
        self.embedding = nn.Parameter(torch.empty(width))
        self.head = nn.Linear(3 * 32**2, 10)

    def forward(self, images):
        return self.head(images.flatten(1))


@pytest.mark.parametrize("arguments", [{"depth": 10**12}, {"width": 10**12}, {"drops": 10**12}, {}])
def test_a_network_that_cannot_be_built_without_memory_is_limited(changed, arguments):
    def alter(content):
        content["hyper_parameters"]["model"] = {"_target_": f"{__name__}.Deep", **arguments}
        network = construct(Deep, 10, 32)
        content["state_dict"] = {f"network.{name}": value for name, value in network.state_dict().items()}

    checkpoint = Checkpoint.open(changed(alter))
    if not arguments:
        assert isinstance(checkpoint.network([Deep]).network, Deep)
        return
    with pytest.raises(UserError, match=r"changed\.ckpt: the network cannot be built: (it is larger|.*memory)"):
        checkpoint.network([Deep])
    assert len(nn.Sequential(*[nn.Identity()] * 2000)) == 2000  # the limit ends with the construction


def test_a_network_of_torchvision_that_cannot_be_built_without_memory_is_loaded(changed):
    from torchvision.models import regnet_y_400mf

    from cifarnet.models.library import LibraryModel

    model = {"_target_": "cifarnet.models.library.LibraryModel", "library": "torchvision", "name": "regnet_y_400mf"}
    network = LibraryModel("torchvision", "regnet_y_400mf")
    state = {f"network.{name}": value for name, value in network.state_dict().items()}

    def alter(content):
        content["hyper_parameters"]["model"] = model
        content["state_dict"] = state

    checkpoint = Checkpoint.open(changed(alter))
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(checkpoint.network()(images), network.eval()(images))
    assert type(checkpoint.network().network) is type(regnet_y_400mf())


def test_large_numbers_for_networks_of_this_project_are_refused(changed):
    for settings in ({"depth": 10**6 + 1}, {"sizes": [{"x": [-(10**9)]}]}, {"rate": 1e300}):
        with pytest.raises(UserError, match="is not plain data"):
            Checkpoint.open(changed(alter_settings(model=LIBRARY | settings))).architecture()
    largest = changed(alter_settings(model=LIBRARY | {"depth": 10**6}))
    assert Checkpoint.open(largest).architecture()[1]["depth"] == 10**6


def same_list_many_times():
    value = []
    for _ in range(15):
        value = [value, value, value, value]
    return value


def list_in_itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("make", [same_list_many_times, list_in_itself, lambda: [0] * 10**5])
@pytest.mark.parametrize("key", ["model", "config", "data"])
def test_settings_that_grow_when_they_are_read_are_refused(changed, key, make):
    def alter(content):
        content["hyper_parameters"][key]["x"] = make()

    path = changed(alter)
    with pytest.raises(UserError, match=rf"^{path} is not a readable .*too many or nested too deeply"):
        Checkpoint.open(path)


def test_settings_may_be_nested_in_20_levels(changed):
    value = []
    for _ in range(17):
        value = [value]  # 18 lists, in the arguments of the network, in the settings
    assert Checkpoint.open(changed(alter_model(x=value))).model["x"] == value
    with pytest.raises(UserError, match="nested too deeply"):
        Checkpoint.open(changed(alter_model(x=[value])))


def test_compressed_and_overlapping_entries_are_refused(run, tmp_path):
    path = tmp_path / "bomb.ckpt"
    compressed = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(run / "checkpoints/best.ckpt") as original, compressed as archive:
        for entry in original.infolist():
            archive.writestr(entry.filename, original.read(entry))
        archive.writestr("best/data/1000", bytes(10**7))
    with pytest.raises(UserError, match="is not a readable cifarnet checkpoint: its entries are compressed or overlap"):
        Checkpoint.open(path)


def test_a_network_may_share_its_layers_but_is_not_larger_than_the_file(changed):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in ConvMixer(width=512, depth=50).state_dict().items()}
    shared = torch.zeros(512 * 512)

    def alter(content):  # 50 layers that have the same values
        content["hyper_parameters"]["model"] = {
            "_target_": "cifarnet.models.convmixer.ConvMixer",
            "width": 512,
            "depth": 50,
        }
        weights = {f"network.{name}": shared[: shape.numel()].view(shape) for name, shape in shapes.items()}
        content["state_dict"] = weights

    with pytest.raises(UserError, match="larger than its weights"):
        Checkpoint.open(changed(alter)).network()


class SharedLayers(nn.Module):
    """Uses one layer eight times: its state has eight names for the same values."""

    def __init__(self, num_classes, image_size=32):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3 * image_size**2, 3 * image_size**2)] * 8)
        self.head = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, x):
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


def test_a_network_that_uses_a_layer_several_times_can_be_loaded(config, tmp_path):
    own = ["~model", "+model={_target_: test_checkpoint.SharedLayers}"]
    train(config(*own, without="model"))
    network = Checkpoint.open(tmp_path / "run").network([SharedLayers])
    layers = [layer for name, layer in network.named_modules(remove_duplicate=False) if name.endswith(".blocks.7")]
    assert len(layers) == 1
    assert layers[0] is network.get_submodule(f"{'network.' if hasattr(network, 'network') else ''}blocks.0")


@pytest.mark.parametrize("name", ["pipe.ckpt", "zero.ckpt", "hub", "large"])
def test_a_pipe_a_device_and_a_large_file_are_not_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    (tmp_path / "hub").mkdir()
    os.mkfifo(tmp_path / "hub" / HUB_SETTINGS)
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / HUB_SETTINGS).open("wb") as file:
        file.truncate(2**26 + 1)
    for folder in ("hub", "large"):
        save_file({"network.x": torch.zeros(1)}, tmp_path / folder / HUB_WEIGHTS)
    with pytest.raises(UserError, match=r"no checkpoint found|not a regular file|larger than 64 MB"):
        Checkpoint.open(tmp_path / name)
