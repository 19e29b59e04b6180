"""Data sets of torchvision, from small files in their official formats."""

import bz2
import csv
import hashlib
import http.server
import json
import struct
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from cifarnet.cli import compose
from cifarnet.config import validate
from cifarnet.data import Torchvision
from cifarnet.errors import NoImages, UserError
from cifarnet.evaluate import evaluate

RANDOM = np.random.default_rng(0)


def photograph(path, size=(40, 30)):
    """Write a JPEG of one colour; return the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(RANDOM.integers(0, 256, 3).tolist())
    Image.new("RGB", size, colour).save(path, quality=100)
    return colour


def idx(array) -> bytes:
    """Return an array of bytes, or of int32, in MNIST's format."""
    kind = {np.dtype(np.uint8): 8, np.dtype(">i4"): 12}[array.dtype]
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


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


def test_qmnist(tmp_path):
    (tmp_path / "QMNIST/raw").mkdir(parents=True)
    for part, count in {"train": 40, "test": 20}.items():
        pixels = RANDOM.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.stack([np.arange(count) % 10, *RANDOM.integers(0, 99, (7, count))], 1).astype(">i4")  # and writers
        (tmp_path / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (tmp_path / f"QMNIST/raw/qmnist-{part}-labels-idx2-int").write_bytes(idx(labels))
    source = read("QMNIST", tmp_path, image_size=28)
    assert source.class_names == torchvision.datasets.QMNIST.classes
    assert torch.equal(source.test.images, torch.tensor(pixels)[:, None].expand(-1, 3, -1, -1))
    assert source.test.labels.tolist() == [*range(10)] * 2


def test_usps(tmp_path):
    for file, count in {"usps.bz2": 40, "usps.t.bz2": 20}.items():
        pixels = RANDOM.integers(0, 2, (count, 256)) * 2 - 1  # black or white
        lines = [" ".join(f"{i + 1}:{value}" for i, value in enumerate(row)) for row in pixels]
        text = "\n".join(f"{number % 10 + 1} {line}" for number, line in enumerate(lines))
        (tmp_path / file).write_bytes(bz2.compress(text.encode()))
    source = read("USPS", tmp_path, image_size=16)
    assert source.class_names == [str(digit) for digit in range(10)]
    expected = torch.tensor(pixels > 0).view(20, 1, 16, 16).expand(-1, 3, -1, -1) * 255
    assert torch.equal(source.test.images, expected.to(torch.uint8))
    assert source.test.labels.tolist() == [*range(10)] * 2


def test_arguments_on_the_command_line():
    settings = ["data=torchvision", "data.name=EMNIST", "data.arguments={split: letters}", "output_dir=run"]
    config = compose("train", settings)
    validate(config)
    assert config.data.arguments == {"split": "letters"}


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


def imagenette(root):
    """Write two classes without test images, which the validation images replace; the classes have several names."""
    for part, count in {"train": 4, "val": 2}.items():
        names = [f"{wnid}/{i}.JPEG" for wnid in ("n01440764", "n03000684") for i in range(count)]
        colours = [photograph(root / f"imagenette2/{part}/{name}") for name in names]
    return ["tench", "chain saw"], colours, [0, 0, 1, 1]


def dtd(root):
    (root / "dtd/dtd/labels").mkdir(parents=True)
    for part, count in {"train": 4, "val": 4, "test": 4}.items():
        names = [f"{('banded', 'woven')[i % 2]}/{part}{i}.jpg" for i in range(count)]
        colours = [photograph(root / f"dtd/dtd/images/{name}") for name in names]
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(names))
    return ["banded", "woven"], colours, [0, 1, 0, 1]


def aircraft(root):
    folder = root / "fgvc-aircraft-2013b/data"
    for part, count in {"train": 4, "val": 4, "test": 4}.items():
        colours = [photograph(folder / f"images/{part}{i}.jpg") for i in range(count)]
        lines = [f"{part}{i} {('Boeing 707', 'A320')[i % 2]}" for i in range(count)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines))
    (folder / "variants.txt").write_text("Boeing 707\nA320\n")
    return ["Boeing 707", "A320"], colours, [0, 1, 0, 1]


def country211(root):
    for part, count in {"train": 2, "valid": 2, "test": 2}.items():
        names = [f"{part}/{name}/{i}.jpg" for name in ("AD", "ZW") for i in range(count)]
        colours = [photograph(root / "country211" / name) for name in names]
    return ["AD", "ZW"], colours, [0, 0, 1, 1]


PHOTOGRAPHS = [
    ("GTSRB", gtsrb),
    ("Food101", food101),
    ("OxfordIIITPet", oxford_pets),
    ("Imagenette", imagenette),
    ("DTD", dtd),
    ("FGVCAircraft", aircraft),
    ("Country211", country211),
]


@pytest.mark.parametrize(("name", "write"), PHOTOGRAPHS)
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
    with pytest.raises(
        UserError, match=r"(?s)SVHN cannot be downloaded.*copy its .*data/SVHN\n.*\+experiment=quickstart"
    ):
        read("SVHN", root)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]
    with pytest.raises(NoImages, match=r"data/SVHN does not contain SVHN.*data.read_only=false"):
        read("SVHN", root, read_only=True)
    (served / "test_32x32.mat").write_bytes(content)
    checksum = Torchvision("SVHN", str(root), batch_size=4, val_fraction=0.25).source.checksum
    assert sorted(path.name for path in root.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    checksums(parts)  # not downloaded again
    assert Torchvision("SVHN", str(root), batch_size=4, val_fraction=0.25, read_only=True).source.checksum == checksum


def test_a_folder_with_other_files_is_not_replaced(tmp_path, checksums):
    parts, root = svhn(tmp_path / "data"), tmp_path / "data"
    checksums(parts)
    (root / "train_32x32.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"^data\.root={root} contains files, but not all of SVHN\. .* new folder"):
        read("SVHN", root)
    imagenette(root)
    with pytest.raises(UserError, match=r"data contains files, but not all of Imagenette \{'size': '160px'\}\."):
        read("Imagenette", root, arguments={"size": "160px"})
    assert sorted(path.name for path in root.iterdir()) == ["imagenette2", "test_32x32.mat", "train_32x32.mat"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MNIST", {"download": True}),
        ("MNIST", {"train": False}),
        ("MNIST", {"transform": None}),
        ("MNIST", {"root": "x"}),
        ("Food101", {"split": "test"}),
    ],
)
def test_arguments_that_other_settings_determine_are_refused(tmp_path, name, arguments):
    mnist(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.arguments\.{next(iter(arguments))} cannot be set\. Remove it"):
        read(name, tmp_path, arguments=arguments)


def test_a_missing_package_is_reported_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"^data\.name=PCAM .*pip install h5py"):
        read("PCAM", tmp_path / "data")


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


@pytest.fixture
def mnist_run(tmp_path):
    """The settings of a run on a small MNIST."""
    mnist(tmp_path / "data")
    return ["data=torchvision", "data.name=MNIST", f"data.root={tmp_path}/data", "data.batch_size=8"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_that_was_stopped_equals_one_that_was_not(resumed_run, mnist_run, tmp_path, in_memory):
    settings = ["data.val_fraction=0.25", f"data.in_memory={in_memory}", "data.workers=0"]
    record = resumed_run(*mnist_run, *settings, moment=(0, 2), without="data").data
    assert (record["source"], record["classes"], record["test"]) == ("MNIST", 10, 20)
    with pytest.raises(NoImages, match=r"Add data\.name=… data\.root=… data\.arguments=…"):
        evaluate(tmp_path / "whole", ["corruptions=false"])
    for chosen in ([], ["data=torchvision"]):
        assert evaluate(tmp_path / "whole", ["corruptions=false", *chosen, *mnist_run[1:3]])["data"] == record


def test_two_ranks_stream_and_transform_the_same_images(sharded_run, mnist_run):
    blur = "data.transforms={blur: {_target_: torchvision.transforms.v2.GaussianBlur, kernel_size: 3}}"
    settings = ["data.val_fraction=0.25", "data.image_size=20", "data.in_memory=false", "data.workers=0", blur]
    sharded_run(*mnist_run, *settings, without=("data",))
