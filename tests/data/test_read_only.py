"""Data settings of a file never download, create or delete files; only the user's command does."""

import http.server
import os
import threading
from pathlib import Path

import pytest
import torchvision

from cifarnet.checkpoint import Checkpoint
from cifarnet.data import ImageFolder
from cifarnet.errors import NoImages, UserError
from cifarnet.evaluate import evaluate
from cifarnet.inference import test_images
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import picture


@pytest.fixture
def server(monkeypatch):
    """A server in place of the official one: its URL, and the requests that it received."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http_server.server_port}/archive.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        yield url, requests
        http_server.shutdown()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The default folder of CIFAR-10, which contains a folder that a download would delete."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/.unfinished-mine").mkdir(parents=True)
    (tmp_path / "data/.unfinished-mine/thesis.txt").touch()
    return tmp_path / "data"


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "load",
    [
        lambda path: evaluate(path, ["corruptions=false"]),
        lambda path: evaluate(path, ["corruptions=false", "data.root=data"]),
        lambda path: test_images.load("export", [], Checkpoint.open(path), []),  # export and demo
        lambda path: train(*resume(path)),
    ],
    ids=["evaluate", "root", "export", "resume"],
)
def test_nothing_is_downloaded_or_deleted(changed, data, server, load):
    url, requests = server
    settings = {"_target_": "cifarnet.data.CIFAR10", "root": str(data), "url": url, "read_only": False}

    def alter(content):
        content["hyper_parameters"]["data"] = content["hyper_parameters"]["config"]["data"] = settings

    path, before = changed(alter), files(data)
    with pytest.raises(NoImages, match=r"cifar-10-batches-py does not exist.*data\.read_only=false"):
        load(path)
    assert (requests, files(data)) == ([], before)


def test_the_users_command_downloads(changed, data, server):
    path = changed(lambda content: content["hyper_parameters"].update(data={"_target_": "cifarnet.data.CIFAR10"}))
    for number, chosen in enumerate([["data=cifar10"], ["data.read_only=false"]], 1):
        with pytest.raises(UserError, match="cannot be downloaded"):
            evaluate(path, ["corruptions=false", *chosen])
        assert len(server[1]) == number


@pytest.mark.parametrize("fetch", ["torch.hub.download_url_to_file", "torchvision.models.resnet18"])
@pytest.mark.parametrize("key", ["root", "transforms", "_target_"])
def test_recorded_data_builds_only_data_sets_and_transforms(changed, data, server, fetch, key):
    nested = {"_target_": fetch, "url": server[0], "root": str(data), "dst": str(data / "x")}
    settings = nested if key == "_target_" else {"_target_": "cifarnet.data.CIFAR10", key: {"mine": nested}}
    path = changed(lambda content: content["hyper_parameters"]["config"].update(data=settings))
    before = files(data)
    with pytest.raises(UserError, match=rf"names .*{fetch}.*classes=\[{fetch}\]"):
        resume(path)
    assert (server[1], files(data)) == ([], before)


@pytest.mark.parametrize("name", ["cifarnet.data.folder.os.mkdir", "cifarnet.data.cifar10.Published"])
def test_merely_imported_names_are_refused(changed, name):
    path = changed(lambda content: content["hyper_parameters"]["config"]["data"].update(_target_=name))
    with pytest.raises(UserError, match=f"names .*{name}"):
        resume(path)


def test_image_folders_read_the_cache_and_do_not_write_it(tmp_path, cache):
    for split in ("train", "test"):
        for name in ("a", "b"):
            for i in range(3):
                picture(tmp_path / split / name / f"{i}.png", (i, 0, 0))
    settings = {"root": str(tmp_path), "batch_size": 2, "val_fraction": 0.4}
    decoded = ImageFolder(**settings, read_only=True).source.checksum
    assert os.listdir(cache) == []
    assert ImageFolder(**settings).source.checksum == decoded
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(written) == 2
    assert ImageFolder(**settings, read_only=True).source.checksum == decoded
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == written
