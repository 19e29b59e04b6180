"""Data sets of torchvision, from small files in their official formats."""

import csv
import hashlib
import http.server
import json
import signal
import struct
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from cifarnet.data import Torchvision
from cifarnet.errors import Interrupted, NoImages, UserError
from cifarnet.evaluate import evaluate
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at

RANDOM = np.random.default_rng(0)


def photograph(path, size=(40, 30)):
    """Write a JPEG of one colour; return the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(RANDOM.integers(0, 256, 3).tolist())
    Image.new("RGB", size, colour).save(path, quality=100)
    return colour


def idx(array) -> bytes:
    """Return an array of bytes in MNIST's format."""
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(root, name="MNIST", prefix=("train", "t10k"), first=0, classes=10):
    """Write a set in MNIST's format; return the pixels and labels of each part."""
    parts = []
    for part, count in zip(prefix, (40, 20), strict=True):
        pixels, labels = RANDOM.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % classes
        (root / name / "raw").mkdir(parents=True, exist_ok=True)
        (root / name / "raw" / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (root / name / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels + first))
        parts.append((pixels, labels + first))
    return parts


def read(name, root, **settings):
    return Torchvision(name, str(root), **{"batch_size": 4, "val_fraction": 0.25} | settings).source


def sorted_pixels(*splits):
    """Return the pixels of images in an order that does not depend on the validation split."""
    images = torch.cat([split.images for split in splits]).flatten(1)
    return images[torch.tensor(sorted(range(len(images)), key=lambda i: images[i].tolist()))]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_grey_images_of_mnist_and_its_relatives(tmp_path, name):
    (train_pixels, labels), (pixels, test_labels) = mnist(tmp_path, name)
    source = read(name, tmp_path, image_size=28)
    assert source.class_names == getattr(torchvision.datasets, name).classes
    assert torch.equal(source.test.images, torch.tensor(pixels)[:, None].expand(-1, 3, -1, -1))
    assert source.test.labels.tolist() == test_labels.tolist()
    both = torch.cat([source.train.labels, source.validation.labels])
    assert both.bincount().tolist() == np.bincount(labels).tolist()
    expected = torch.tensor(train_pixels)[:, None].expand(-1, 3, -1, -1).flatten(1)
    assert sorted_pixels(source.train, source.validation).tolist() == sorted(expected.tolist())


def test_letters_of_emnist(tmp_path):
    prefix = ("emnist-letters-train", "emnist-letters-test")
    _, (_, labels) = mnist(tmp_path, "EMNIST", prefix, first=1, classes=20)
    source = read("EMNIST", tmp_path, arguments={"split": "letters"}, val_fraction=0.5)
    assert source.class_names == [chr(ord("a") + i) for i in range(20)]  # without the class N/A, which has no images
    assert source.test.labels.tolist() == (labels - 1).tolist()
    with pytest.raises(UserError, match=r"data.name=EMNIST .*'split'"):
        read("EMNIST", tmp_path)
    with pytest.raises(UserError, match=r"data\.arguments\.splitt.*Did you mean split"):
        read("EMNIST", tmp_path, arguments={"splitt": "letters"})


def svhn(root):
    root.mkdir(parents=True, exist_ok=True)
    parts = {}
    for part, count in {"train": 40, "test": 20}.items():
        pixels, digits = RANDOM.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10
        file = root / f"{part}_32x32.mat"
        savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": np.where(digits == 0, 10, digits)[:, None]})
        parts[part] = pixels, digits, hashlib.md5(file.read_bytes()).hexdigest()
    return parts


@pytest.fixture
def checksums(monkeypatch):
    """Replace the checksums of SVHN."""

    def replace(parts, url="http://127.0.0.1:9"):
        names = {part: [f"{url}/{part}_32x32.mat", f"{part}_32x32.mat", md5] for part, (*_, md5) in parts.items()}
        monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", names)

    return replace


def test_svhn(tmp_path, checksums):
    parts = svhn(tmp_path / "data")
    checksums(parts)
    source = read("SVHN", tmp_path / "data")
    pixels, digits, _ = parts["test"]
    assert source.class_names == [str(digit) for digit in range(10)]
    assert torch.equal(source.test.images, torch.tensor(pixels).permute(0, 3, 1, 2))
    assert source.test.labels.tolist() == digits.tolist()  # the file has 10 instead of 0


def test_stl10(tmp_path, monkeypatch):
    cls, folder = torchvision.datasets.STL10, tmp_path / cls_folder("STL10")
    folder.mkdir()
    pixels = {part: RANDOM.integers(0, 256, (20, 3, 96, 96), np.uint8) for part in ("train", "test")}
    contents = {f"{part}_X.bin": images.transpose(0, 1, 3, 2).tobytes() for part, images in pixels.items()}
    contents |= {f"{part}_y.bin": (np.arange(20, dtype=np.uint8) % 10 + 1).tobytes() for part in pixels}
    contents |= {"unlabeled_X.bin": b"", "class_names.txt": b"\n".join(b"class%d" % i for i in range(10))}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for members in ("train_list", "test_list"):
        listed = [[name, hashlib.md5(contents[name]).hexdigest()] for name, _ in getattr(cls, members)]
        monkeypatch.setattr(cls, members, listed)
    source = read("STL10", tmp_path, image_size=96, val_fraction=0.5)
    assert source.class_names == [f"class{i}" for i in range(10)]
    assert torch.equal(source.test.images, torch.tensor(pixels["test"]))
    assert source.test.labels.tolist() == [*range(10)] * 2


def cls_folder(name: str) -> str:
    return getattr(torchvision.datasets, name).base_folder


def gtsrb(root):
    """Write two classes, whose training images are in folders and whose test images are in a table."""
    colours = [photograph(root / f"gtsrb/GTSRB/Training/{i % 2:05}/{i}.ppm") for i in range(8)]
    rows = [{"Filename": f"{i}.ppm", "ClassId": i % 2} for i in range(4)]
    colours = [photograph(root / "gtsrb/GTSRB/Final_Test/Images" / row["Filename"]) for row in rows]
    with (root / "gtsrb/GT-final_test.csv").open("w") as file:
        writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    return ["0", "1"], colours, [0, 1, 0, 1]


def food101(root):
    (root / "food-101/meta").mkdir(parents=True)
    for part, count in {"train": 4, "test": 2}.items():
        names = {name: [f"{name}/{part}{i}" for i in range(count)] for name in ("apple_pie", "waffles")}
        paths = [root / f"food-101/images/{name}.jpg" for listed in names.values() for name in listed]
        colours = [photograph(path) for path in paths]
        (root / f"food-101/meta/{part}.json").write_text(json.dumps(names))
    return ["apple_pie", "waffles"], colours, [0, 0, 1, 1]


def oxford_pets(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, count in {"trainval": 8, "test": 4}.items():
        names = [f"{('Abyssinian', 'basset_hound')[i % 2]}_{part}{i}" for i in range(count)]
        colours = [photograph(folder / f"images/{name}.jpg") for name in names]
        lines = [f"{name} {i % 2 + 1} {i % 2 + 1} 1" for i, name in enumerate(names)]
        (folder / f"annotations/{part}.txt").write_text("\n".join(lines))
    return ["Abyssinian", "Basset Hound"], colours, [0, 1, 0, 1]


@pytest.mark.parametrize(("name", "write"), [("GTSRB", gtsrb), ("Food101", food101), ("OxfordIIITPet", oxford_pets)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_sets_of_photographs(tmp_path, name, write, in_memory):
    class_names, colours, labels = write(tmp_path)
    source = read(name, tmp_path, image_size=16, in_memory=in_memory, workers=0)
    assert source.class_names == class_names
    assert source.test.labels.tolist() == labels
    images = source.test.images if in_memory else source.test.images.read()
    assert images.shape == (4, 3, 16, 16)
    assert (images[:, :, 8, 8] - torch.tensor(colours).float()).abs().max() < 4
    assert len(source.train) + len(source.validation) == 8
    again = read(name, tmp_path, image_size=16, in_memory=in_memory)  # from the cache
    assert torch.equal(again.train.labels, source.train.labels)


def test_the_validation_images_of_flowers(tmp_path, monkeypatch):
    cls, folder = torchvision.datasets.Flowers102, tmp_path / "flowers-102"
    colours = {i: photograph(folder / f"jpg/image_{i:05}.jpg") for i in range(1, 13)}
    savemat(folder / "imagelabels.mat", {"labels": [[1 + i % 2 for i in range(12)]]})
    savemat(folder / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]})
    files = {"label": "imagelabels.mat", "setid": "setid.mat"}
    sums = {key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for key, name in files.items()}
    monkeypatch.setattr(cls, "_file_dict", cls._file_dict | sums)
    source = read("Flowers102", tmp_path)
    assert [len(part) for part in (source.train, source.validation, source.test)] == [4, 2, 6]
    assert source.class_names == cls.classes[:2]
    assert (source.validation.images[0, :, 9, 9] - torch.tensor(colours[5]).float()).abs().max() < 4


@pytest.fixture
def server(tmp_path):
    """Serve the folder `served`; return the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_the_download_is_complete_or_absent(tmp_path, checksums, server):
    parts, served, root = svhn(tmp_path / "served"), tmp_path / "served", tmp_path / "data/SVHN"
    checksums(parts, server)
    content = (served / "test_32x32.mat").read_bytes()
    (served / "test_32x32.mat").write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"(?s)SVHN cannot be downloaded.*copy .*data/SVHN from there.*data=synthetic"):
        read("SVHN", root)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]
    with pytest.raises(NoImages, match=r"data/SVHN does not contain SVHN.*data.read_only=false"):
        read("SVHN", root, read_only=True)
    (served / "test_32x32.mat").write_bytes(content)
    checksum = Torchvision("SVHN", str(root), batch_size=4, val_fraction=0.25).source.checksum
    assert sorted(path.name for path in root.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    checksums(parts)  # not downloaded again
    assert Torchvision("SVHN", str(root), batch_size=4, val_fraction=0.25, read_only=True).source.checksum == checksum


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SHVN", "data.name=SHVN is not a data set of torchvision. Did you mean SVHN?"),
        ("EuroSAT", "EuroSAT has no training and test images"),
        ("KittiFlow", "data.name=KittiFlow data.arguments={}: Could not find the Kitti flow images"),
        ("VOCDetection", "VOCDetection has no training and test images"),
    ],
)
def test_sets_that_cannot_be_used(tmp_path, name, message):
    with pytest.raises(UserError) as error:
        read(name, tmp_path)
    assert message in str(error.value)


def test_labels_that_are_not_whole_numbers_are_refused(tmp_path):
    oxford_pets(tmp_path)
    with pytest.raises(UserError, match=r"data\.name=OxfordIIITPet: item 0 is not .*tuple"):
        read("OxfordIIITPet", tmp_path, arguments={"target_types": ["category", "binary-category"]})


def test_a_run_that_was_stopped_equals_one_that_was_not(config, tmp_path):
    mnist(tmp_path / "data")
    data = [
        "data=torchvision",
        "data.name=MNIST",
        f"data.root={tmp_path / 'data'}",
        "data.batch_size=8",
        "data.val_fraction=0.25",
    ]
    train(config(*data, folder="whole", without="data"))
    record = json.loads((tmp_path / "whole/metrics.json").read_text())["data"]
    assert (record["source"], record["classes"], record["test"]) == ("MNIST", 10, 20)
    with pytest.raises(NoImages, match=r"Add data\.name=… data\.root=…"):
        evaluate(tmp_path / "whole", ["corruptions=false"])
    again = evaluate(tmp_path / "whole", ["corruptions=false", *data[1:3]])
    assert again["data"] == record
    with pytest.raises(Interrupted):
        train(config(*data, signal_at(0, 2, signal.SIGTERM), folder="stopped", without="data"))
    resumed, checkpoint = resume(tmp_path / "stopped", [ALLOW_SIGNAL])
    resumed.callbacks.signal = None
    train(resumed, checkpoint)
    assert_same_weights(*(tmp_path / folder / "checkpoints/last.ckpt" for folder in ("whole", "stopped")))
