"""Trained networks of the package, which are used by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import cifarnet
from cifarnet import cli, trained
from cifarnet.checkpoint import HUB_WEIGHTS, Checkpoint
from cifarnet.errors import UserError
from cifarnet.export import export
from cifarnet.finetuning import expand
from conftest import CLASS_NAMES


@pytest.fixture
def shipped(run, tmp_path, monkeypatch):
    """The folder of a trained network with the name "small", in float16."""
    monkeypatch.setattr(trained, "FOLDER", tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "trained/small"
    export(run, ["format=hub", f"output={folder}"])
    weights = load_file(folder / HUB_WEIGHTS)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(halves, folder / HUB_WEIGHTS)
    return folder


def test_a_network_is_loaded_by_its_name(run, shipped):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    network, class_names = cifarnet.load("small")
    expected = cifarnet.load(run)
    assert class_names == expected.class_names
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    for value, exact in zip(network.parameters(), expected.network.parameters(), strict=True):
        assert torch.equal(value, exact.half().float())
    torch.testing.assert_close(network(images), expected.network(images), rtol=0.02, atol=0.02)


def test_a_path_takes_precedence_over_a_name(run, shipped, tmp_path):
    tmp_path.joinpath("small").symlink_to(run)
    assert Checkpoint.open("small").path.name == "best.ckpt"
    assert Checkpoint.open(str(shipped)).path == shipped


def test_outputs_are_written_to_the_current_folder(shipped, tmp_path):
    folder = Checkpoint.open("small").folder_for("evaluation")
    assert folder.resolve() == tmp_path / "lightning_logs/trained/small/evaluation"


def test_fine_tuning_starts_from_a_name(shipped):
    settings = ["+experiment=finetune", "model.checkpoint=small", "data.root=x", "output_dir=run"]
    assert expand(cli.compose("train", settings)).start.checkpoint == str(shipped)


def test_an_unknown_name_lists_the_known_ones(shipped):
    with pytest.raises(UserError, match=r"^big: no checkpoint found.* this package: small\.$"):
        cifarnet.load("big")


def test_help_lists_the_names(shipped, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["predict", "--help"])
    with pytest.raises(SystemExit):
        cli.parse("predict", "")
    assert "trained networks (use a name in place of a run's folder): small" in capsys.readouterr().out


def test_the_networks_of_the_package():
    for name in trained.names():
        classifier = cifarnet.load(name)
        assert classifier.class_names == CLASS_NAMES
        settings = json.loads((trained.FOLDER / name / "config.json").read_text())
        assert settings["data"] == {"_target_": "cifarnet.data.CIFAR10", "val_fraction": 0}
        assert f'cifarnet.load("{name}")' in (trained.FOLDER / name / "README.md").read_text()
    assert sum(path.stat().st_size for path in trained.FOLDER.rglob("*") if path.is_file()) < 10 * 10**6


@pytest.mark.parametrize("name", trained.names())
def test_a_network_of_the_package_classifies_photographs(name, photographs):
    """The photographs are compressed with JPEG, which costs about three points of accuracy."""
    images = sorted(photographs.glob("test/*/00[0-4]*"))
    predictions = cifarnet.load(name).predict(images)
    correct = sum(image.parent.name == found.label for image, found in zip(images, predictions, strict=True))
    measured = json.loads((trained.FOLDER / name / "config.json").read_text())["test_accuracy"]
    assert len(images) == 500
    assert correct / len(images) > measured - 0.08
