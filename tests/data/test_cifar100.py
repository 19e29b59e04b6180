import hashlib
import io
import json
import math
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cifarnet
from cifarnet.cli import compose
from cifarnet.data import CIFAR100
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate
from cifarnet.evaluation import public_sets
from cifarnet.train import train

FINE, COARSE = [f"fine{i}" for i in range(100)], [f"coarse{i}" for i in range(20)]


@pytest.fixture
def members(tmp_path, monkeypatch):
    """Write a small archive in the official format into `data`; return the content of its files."""
    published, random = torchvision.datasets.CIFAR100, np.random.default_rng(0)
    contents = {"meta": {"fine_label_names": FINE, "coarse_label_names": COARSE}}
    for part, count in {"train": 200, "test": 100}.items():
        fine = [(7 * i) % 100 for i in range(count)]
        pixels = random.integers(0, 256, (count, 3072), np.uint8)
        contents[part] = {"data": pixels, "fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}
    files = {name: pickle.dumps(content) for name, content in contents.items()}
    archive = tmp_path / "data" / published.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{published.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(published, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(published, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(published, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(published, "meta", published.meta | {"md5": sums["meta"]})
    return contents


def data(tmp_path, **settings):
    return CIFAR100(root=str(tmp_path / "data"), url="http://127.0.0.1:9/x.tar.gz", val_fraction=0.5, **settings)


@pytest.mark.parametrize(("coarse", "key", "names"), [(False, "fine_labels", FINE), (True, "coarse_labels", COARSE)])
def test_pixels_and_labels_are_those_of_the_files(tmp_path, members, coarse, key, names):
    source = data(tmp_path, coarse=coarse).source
    assert source.class_names == names
    assert source.test.labels.tolist() == members["test"][key]
    pixels = torch.tensor(members["test"]["data"]).view(-1, 3, 32, 32)  # red, green, blue; row by row
    assert torch.equal(source.test.images, pixels)
    both = torch.cat([source.train.labels, source.validation.labels])
    assert both.bincount().tolist() == np.bincount(members["train"][key]).tolist()


def test_a_failed_download_names_the_archive(tmp_path, members):
    (tmp_path / "data" / "cifar-100-python.tar.gz").unlink()
    with pytest.raises(UserError, match=r"(?s)CIFAR-100 cannot .*cifar-100-python\.tar\.gz \(md5 .*data\.url="):
        assert data(tmp_path).source


def test_human_labels_of_cifar10_are_refused(tmp_path, members):
    with pytest.raises(UserError, match="requires CIFAR-10's test images"):
        public_sets.read(data(tmp_path), None, None, "cifar10h-probs.npy")


def test_the_experiment_trains_on_cifar100(tmp_path, members):
    small = ["+model.width=4", "data.batch_size=10", "data.val_fraction=0.5", "trainer.max_epochs=1", "trainer=cpu"]
    folders = [f"data.root={tmp_path}/data", f"output_dir={tmp_path}/run", "trainer.precision=32-true", "threads=1"]
    record = train(compose("train", ["+experiment=cifar100", *small, *folders]))
    assert (record.data["source"], record.data["classes"]) == ("CIFAR100", 100)
    assert record.history[0]["train/cross_entropy"] == pytest.approx(math.log(100), rel=0.2)


def test_a_run_with_100_classes_and_its_evaluation(resumed_run, tmp_path, members, monkeypatch):
    root = f"data.root={tmp_path / 'data'}"
    settings = ["data=cifar100", root, "data.batch_size=20", "data.val_fraction=0.5"]
    resumed_run(*settings, moment=(0, 2), without="data")
    run = tmp_path / "whole"
    record = evaluate(run, ["corruptions=false", root])
    assert (record["data"]["source"], record["data"]["classes"]) == ("CIFAR100", 100)
    network, _ = cifarnet.load(run)
    test = data(tmp_path).source.test
    with torch.no_grad():
        ranked = network(test.images).argsort(1, descending=True)
    expected = (ranked[:, :5] == test.labels[:, None]).any(1).double().mean().item()
    assert record["test"]["top5_accuracy"] == pytest.approx(expected)
    for name in ("confusion", "mistakes", "reliability"):
        assert max(Image.open(run / f"evaluation/{name}.png").size) < 2000
    monkeypatch.chdir(run)  # without the folder data
    with pytest.raises(UserError, match=r"Add data=cifar100 to download them"):
        evaluate(run, ["corruptions=false"])


def test_a_run_on_the_superclasses_and_its_evaluation(config, tmp_path, members):
    root = f"data.root={tmp_path / 'data'}"
    train(config("data=cifar100", root, "data.coarse=true", "data.batch_size=20", without="data"))
    record = evaluate(tmp_path / "run", ["corruptions=false", "data=cifar100", root])
    assert record["data"] == json.loads((tmp_path / "run/metrics.json").read_text())["data"]
    assert record["data"]["classes"] == 20
