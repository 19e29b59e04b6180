import pytest
import torch
from torch import nn

import cifarnet
from cifarnet import checkpoint
from cifarnet.errors import UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import OwnNetwork


def test_own_network(config, tmp_path):
    own = config("~model", "+model={_target_: conftest.OwnNetwork}", without="model")
    train(own)
    with pytest.raises(UserError, match="OwnNetwork, which is no class that this project lists"):
        cifarnet.load(tmp_path / "run")
    network, _ = cifarnet.load(tmp_path / "run", classes=[OwnNetwork])
    assert network.layers[0].std.max() < 1  # the statistics came along


class Bare(nn.Module):
    """Takes floats alone, and neither the number of classes nor the size of images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32**2, 10)

    def forward(self, images):
        assert images.dtype == torch.float32
        return self.head(images.flatten(1))


def test_a_network_without_normalize_gets_one_in_front(config, tmp_path):
    train(config("~model", f"+model={{_target_: {__name__}.Bare}}", without="model"))
    network, names = cifarnet.load(tmp_path / "run", classes=[Bare])
    assert network.normalize.std.max() < 1
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, len(names))


def test_a_network_of_torchvision_needs_no_line_of_code(config, tmp_path):
    """Trained, gone on with, loaded."""
    import torchvision

    small = "{_target_: torchvision.models.ShuffleNetV2, stages_repeats: [1,1,1], stages_out_channels: [4,8,8,8,8]}"
    train(config("~model", f"+model={small}", "scheduler=constant", "trainer.max_epochs=1", without="model"))
    classes = ["classes=[torchvision.models.ShuffleNetV2]"]
    with pytest.raises(UserError, match=r"asks for torchvision.models.ShuffleNetV2.*classes=\[module.YourClass\]"):
        resume(tmp_path / "run")
    train(*resume(tmp_path / "run", [*classes, "trainer.max_epochs=2"]))
    network, _ = cifarnet.load(tmp_path / "run", classes=[torchvision.models.ShuffleNetV2])
    assert isinstance(network.network, torchvision.models.ShuffleNetV2)
    assert network.network.fc.out_features == 10


def test_checkpoint_with_code_is_refused(config, tmp_path):
    train(config())
    path = tmp_path / "run/checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["extra"] = nn.Linear(1, 1)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="not a checkpoint"):
        cifarnet.load(path)


def test_config_is_kept_as_written_and_read_resolved(config, tmp_path):
    train(config("seed=3", "trainer.max_epochs=1", "scheduler=constant"))
    content = checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")
    assert content["hyper_parameters"]["config"]["data"]["shuffle_seed"] == "${seed}"
    assert content["resolved"]["data"]["shuffle_seed"] == 3
    assert content["hyper_parameters"].keys() == {
        "cifarnet",
        "class_names",
        "image_size",
        "images",
        "precision",
        "config",
    }


def test_a_folder_around_a_run_or_in_it_is_no_run(config, tmp_path):
    train(config())
    (tmp_path / "run/exported").mkdir()
    for asked in (tmp_path, *(tmp_path / "run" / part for part in ("exported", "checkpoints", "checkpoints/no.ckpt"))):
        with pytest.raises(UserError, match=rf"There is no checkpoint .* Did you mean {tmp_path}/run\?"):
            cifarnet.load(asked)
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"There is no checkpoint {tmp_path}/other/a\.ckpt\. A run keeps"):
        cifarnet.load(tmp_path / "other/a.ckpt")
    (tmp_path / "network.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"network\.onnx was exported, for other programs to run\. Name the run"):
        cifarnet.load(tmp_path / "network.onnx")
