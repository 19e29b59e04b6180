import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import cifarnet
from cifarnet.data import CIFAR10, Source, Split
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate
from cifarnet.evaluation import public_sets
from cifarnet.train import train
from conftest import CLASS_NAMES


@pytest.fixture
def run(config, tmp_path, archive, published):
    """A run on a small archive in CIFAR-10's format."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar-10-python.tar.gz").write_bytes(archive["bytes"])
    data = ["data=cifar10", f"data.root={tmp_path}/data", "data.batch_size=30", "data.val_fraction=0.1"]
    recipe = ["+experiment=speedrun", "model.widths=[8,8,8]", "module.tta=none", "trainer.max_epochs=1"]
    train(config(*recipe, *data, without=("data", "model")))
    return tmp_path / "run"


@pytest.fixture
def evaluated(run, tmp_path):
    """Evaluate the run with overrides."""
    return lambda *overrides: evaluate(run, ["corruptions=false", f"data.root={tmp_path}/data", *overrides])


def save(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_public_sets_in_their_formats(run, evaluated, tmp_path):
    """The sets consist of the test images; CIFAR-10-C's labels are the network's predictions for clean images."""
    network, _ = cifarnet.load(run)
    test = CIFAR10(root=str(tmp_path / "data"), batch_size=10).source.test
    with torch.no_grad():
        answers, inverted = (network(images).argmax(1) for images in (test.images, 255 - test.images))
    agreement = (answers == inverted).double().mean().item()
    assert agreement < 1
    pixels, labels = test.images.permute(0, 2, 3, 1).numpy(), test.labels.numpy()
    third_inverted = np.concatenate([pixels, pixels, 255 - pixels, pixels, pixels])
    truth = np.tile(answers.numpy(), 5).astype(np.uint8)
    c = save(
        tmp_path / "C", fog=np.tile(pixels, (5, 1, 1, 1)), spatter=third_inverted, snow=third_inverted, labels=truth
    )
    v6 = {"cifar10.1_v6_data": pixels[:7], "cifar10.1_v6_labels": labels[:7].astype(np.int32)}
    humans = save(tmp_path / "H", **{"cifar10h-probs": np.eye(10)[labels]}) / "cifar10h-probs.npy"
    public = [f"cifar10_c={c}", f"cifar10_1={save(tmp_path / '1', **v6)}", f"cifar10h={humans}"]

    measured = evaluated(*public)
    table = measured["cifar10_c"]["accuracy"]
    assert table["fog"] == [1, 1, 1, 1, 1]
    assert table["snow"] == table["spatter"] == [1, 1, agreement, 1, 1]
    assert measured["cifar10_c"]["averaged"] == ["fog", "snow"]  # published means exclude spatter
    assert measured["cifar10_c"]["mean"] == pytest.approx((9 + agreement) / 10)
    assert measured["cifar10_1"]["v6"]["images"] == 7
    assert measured["cifar10_1"]["v6"]["accuracy"] == (answers[:7] == test.labels[:7]).double().mean().item()
    assert measured["cifar10h"]["cross_entropy"] == pytest.approx(measured["test"]["cross_entropy"])
    assert measured["cifar10h"]["entropy"] == 0
    page = (run / "evaluation/report.html").read_text()
    for shown in ("CIFAR-10-C", "CIFAR-10.1 v6", "CIFAR-10H"):
        assert shown in page
    assert (run / "evaluation/cifar10_c.png").exists()
    assert json.loads((run / "evaluation/metrics.json").read_text())["cifar10_c"]["accuracy"] == table


def test_cifar10h_needs_the_official_order(run, evaluated, tmp_path):
    """A folder of the same pictures has another order."""
    source = CIFAR10(root=str(tmp_path / "data"), batch_size=10).source
    for split, name in [(source.train, "train"), (source.test, "test")]:
        for i, label in enumerate(split.labels.tolist()):
            folder = tmp_path / "pictures" / name / CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    save(tmp_path / "H", **{"cifar10h-probs": np.full((20, 10), 0.1)})
    pictures = ["corruptions=false", "data=folder", f"data.root={tmp_path / 'pictures'}"]
    with pytest.raises(UserError, match="official order; the data is ImageFolder"):
        evaluate(run, [*pictures, f"cifar10h={tmp_path / 'H/cifar10h-probs.npy'}"])
    measured = evaluate(run, pictures)
    assert measured["data"]["source"] == "ImageFolder"
    assert measured["test"]["accuracy"] == evaluated()["test"]["accuracy"]


def test_checkpoint_names_neither_folder_nor_address(run, evaluated, monkeypatch, tmp_path):
    path, address = run / "checkpoints/best.ckpt", "https://mirror.invalid/archive"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["data"] |= {"url": "https://stranger.invalid/archive", "root": str(tmp_path)}
    torch.save(checkpoint, path)
    assert not {"url", "flip"} & evaluated()["config"]["data"].keys()
    assert evaluated(f"data.url={address}")["config"]["data"]["url"] == address
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # nothing is downloaded
    with pytest.raises(UserError, match=r"Add data=cifar10 to download them, or data.root"):
        evaluate(run, ["corruptions=false"])
    monkeypatch.chdir(tmp_path)  # the default, data.root=data, exists here
    assert evaluate(run, ["corruptions=false"])["test"]["images"] == 20


class Pictured(CIFAR10):
    """A data module with `count` test images of these classes."""

    def __init__(self, class_names=CLASS_NAMES, count=20):
        super().__init__(batch_size=1)
        images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        split = Split(images, torch.zeros(count, dtype=torch.int64))
        self.source = Source(class_names, split, split, split)


GOOD = {"fog": np.zeros((10, 32, 32, 3), np.uint8), "labels": np.arange(10)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"fog": GOOD["fog"]}, r"labels\.npy cannot be read"),
        ({"labels": GOOD["labels"]}, "0 corruptions"),
        ({**GOOD, "labels": np.arange(9)}, "9 labels"),
        ({**GOOD, "labels": np.arange(5)}, r"fog.npy .*uint8 \[10, 32, 32, 3\], expected uint8 \[5, 32, 32, 3\]"),
        ({**GOOD, "labels": np.arange(10) + 1}, "labels other than 0 to 9"),
        ({**GOOD, "labels": np.arange(10) / 10}, r"labels\.npy .*float64 \[10\], expected integer"),
        ({**GOOD, "fog": GOOD["fog"].astype(np.float32)}, "fog.npy .*float32"),
        ({**GOOD, "fog": GOOD["fog"][:, :24, :24]}, r"fog.npy .*uint8 \[10, 24, 24, 3\]"),
        ({**GOOD, "fog": np.array([{}] * 10)}, "fog.npy cannot be read"),
    ],
)
def test_damaged_cifar10_c(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        public_sets.read(Pictured(), str(save(tmp_path / "C", **arrays)), None, None)


class Bomb:
    """An object whose unpickling creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_other_unreadable_sets(tmp_path):
    folder = save(tmp_path / "some", **GOOD)
    with pytest.raises(UserError, match=r"cifar10_c=.*the network has disc, ring"):
        public_sets.read(Pictured(["disc", "ring"]), str(folder), None, None)
    with pytest.raises(UserError, match=r"has no cifar10\.1_v6_data.npy"):
        public_sets.read(Pictured(), None, str(folder), None)
    for content in (b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00v\x00{" + b"(" * 117):
        (folder / "fog.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"fog\.npy cannot be read"):
            public_sets.read(Pictured(), str(folder), None, None)
    (folder / "fog.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"fog\.npy cannot be read"):
        public_sets.read(Pictured(), str(folder), None, None)
    (folder / "fog.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match=r"fog\.npy cannot be read"):
        public_sets.read(Pictured(), str(folder), None, None)
    assert not (tmp_path / "exploded").exists()
    for place in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere", "\0"):
        if str(place).endswith("pipe"):
            os.mkfifo(place)
        with pytest.raises(UserError, match="there is no such file"):
            public_sets.read(Pictured(), None, None, str(place))
    swapped = save(tmp_path / "H", probs=np.full((20, 10), 0.1, ">f8")) / "probs.npy"
    assert public_sets.read(Pictured(), None, None, str(swapped)).cifar10h.sum() == pytest.approx(20)
    humans = save(tmp_path / "H", probs=np.full((20, 10), 0.2)) / "probs.npy"
    with pytest.raises(UserError, match="sum of 1"):
        public_sets.read(Pictured(), None, None, str(humans))
    with pytest.raises(UserError, match=r"expected floating \[10000, 10\]"):
        public_sets.read(Pictured(count=10_000), None, None, str(humans))
