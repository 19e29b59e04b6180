"""The demo's page agrees with `predict`, works without test pictures, and serves nothing but itself."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import cifarnet
from cifarnet.demo import choose, main, only_this_page, serving, titles
from cifarnet.errors import UserError
from cifarnet.inference import test_images
from conftest import picture
from test_predict import odd_pictures

CPU = ["accelerator=cpu", "pictures=6"]


@pytest.fixture(scope="module")
def client(run):
    with serving([str(run), str(run / "checkpoints/last.ckpt")], [*CPU, "upload_limit=0.5"]) as address:
        assert address.startswith("http://127.0.0.1:")
        yield Client(address, verbose=False)


def upload(client, path):
    return client.predict(handle_file(str(path)), api_name="/answer")


def probabilities(label) -> dict[str, float]:
    return {row["label"]: row["confidence"] for row in label["confidences"]}


def test_page_agrees_with_predict(client, run, tmp_path):
    for path in odd_pictures(tmp_path):
        first, _, _, second, _, _ = upload(client, path)
        for label, trained in [(first, run), (second, run / "checkpoints/last.ckpt")]:
            (expected,) = cifarnet.load(trained).predict(path, accelerator="cpu")
            shown = {name: value for name, value in expected.probabilities.items() if f"{value:.0%}" != "0%"}
            assert probabilities(label) == pytest.approx(shown, abs=1e-6), path.name
            assert label["label"] == expected.label


def test_heading_and_labels(client, run):
    parts = [part["props"] for part in client.config["components"]]
    assert "# What does the picture show?" in next(part["value"] for part in parts if "value" in part)
    labels = [part["label"] for part in parts if "num_top_classes" in part]
    epochs = [cifarnet.load(path).checkpoint.epoch for path in (run, run / "checkpoints/last.ckpt")]
    paths = [str(run), str(run / "checkpoints/last.ckpt")]
    expected = [f"train ({path}), epoch {epoch}" for path, epoch in zip(paths, epochs, strict=True)]
    assert labels == expected  # the paths, because the names are equal
    assert titles({"lightning_logs/train/2026-11-22": cifarnet.load(run)}) == [f"train, epoch {epochs[0]}"]
    kinds = [part["type"] for part in client.config["components"]]
    assert kinds.index("label") < kinds.index("gallery") if "gallery" in kinds else True


def test_pictures_are_enlarged(client, tmp_path):
    picture(tmp_path / "a.png")
    _, pixels, heat, *_ = upload(client, tmp_path / "a.png")
    from PIL import Image

    assert Image.open(pixels).size == Image.open(heat).size == (256, 256)
    assert Image.open(pixels).convert("RGB").getpixel((9, 9)) == (10, 20, 30)


def test_files_that_are_not_pictures(client, tmp_path):
    path = tmp_path / "cut.png"
    picture(path, size=(300, 300))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(AppError, match="This picture cannot be read as an image"):
        upload(client, path)
    tmp_path.joinpath("text.png").write_text("no picture")
    with pytest.raises(AppError, match="This picture cannot be read as an image"):
        upload(client, tmp_path / "text.png")
    tmp_path.joinpath("large.bmp").write_bytes(bytes(2**20))
    with pytest.raises(Exception, match="exceeds the maximum file size of 524288 bytes"):
        upload(client, tmp_path / "large.bmp")


def ask(client, picture, **headers) -> str:
    """Return the events that answer a request with this JSON for the picture."""
    address = f"{client.src}gradio_api/call/answer"
    response = httpx.post(address, json={"data": [picture]}, headers=headers)
    if response.status_code != 200:
        return f"{response.status_code} {response.text}"
    return httpx.get(f"{address}/{response.json()['event_id']}", headers=headers).text


def uploads() -> Path:
    return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_only_uploaded_files_are_read(client, tmp_path, monkeypatch, meta):
    picture(tmp_path / "server.png")
    inside = uploads() / "inside.png"
    picture(inside)
    uploads().joinpath("link.png").unlink(missing_ok=True)
    uploads().joinpath("link.png").symlink_to(tmp_path / "server.png")
    resolve, resolved = socket.getaddrinfo, set()
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **b: [resolved.add(host), resolve(host, *a, **b)][1])
    assert "event: complete" in ask(client, {"path": str(inside), **meta})
    refused = [tmp_path / "server.png", uploads(), uploads() / "link.png", uploads() / "../server.png", "", "a\0"]
    for path in [*map(str, refused), "http://127.0.0.1:9/a.png", "https://cifarnet.invalid/a.png", "file:///a.png"]:
        assert "event: error" in ask(client, {"path": path, **meta}), path
    answer = ask(client, {"path": str(inside), "url": "http://cifarnet.invalid/a.png", **meta})
    assert "event: complete" in answer  # the URL is ignored
    assert resolved == {"127.0.0.1"}


def test_foreign_hosts_and_origins_are_refused(client):
    own = client.src.split("/")[2]
    for headers in [
        {"Host": "evil.example"},
        {"Host": f"evil.example:{own.rpartition(':')[2]}"},
        {"Host": f"127.0.0.1.evil.example:{own.rpartition(':')[2]}"},
        {"Host": "192.0.2.1"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ]:
        assert ask(client, None, **headers).startswith("403"), headers
        assert httpx.get(client.src, headers=headers).status_code == 403, headers
    for headers in [
        {"Origin": f"http://{own}"},
        {"Host": "localhost:9", "Origin": "http://LOCALHOST:9"},
        {"Host": "[::1]"},
    ]:
        assert "event: complete" in ask(client, None, **headers), headers


@pytest.mark.parametrize(
    ("host", "accepted", "refused"),
    [
        ("0.0.0.0", ["192.0.2.1:7860", "[2001:db8::1]:7860", "localhost"], ["evil.example", "192.0.2.1.evil.example"]),
        ("gpu.example", ["gpu.example", "GPU.example:80", "127.0.0.1"], ["192.0.2.1", "example"]),
    ],
)
def test_hosts_of_other_addresses(host, accepted, refused):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    server = TestClient(only_this_page(Starlette(), host))
    assert [server.get("/", headers={"Host": name}).status_code for name in accepted] == [404] * len(accepted)
    assert [server.get("/", headers={"Host": name}).status_code for name in refused] == [403] * len(refused)


def test_other_addresses_of_gradio_are_refused(client, tmp_path):
    picture(tmp_path / "a.png")
    for path in ("file=http://127.0.0.1:9/a.png", "file=https://cifarnet.invalid/", "proxy=http://127.0.0.1:9/"):
        assert httpx.get(f"{client.src}gradio_api/{path}").status_code == 403, path
    assert httpx.get(f"{client.src}gradio_api/file={tmp_path}/a.png").status_code == 403
    recording = httpx.post(f"{client.src}gradio_api/process_recording", files={"video": ("a.mp4", b"#EXTM3U")})
    assert recording.status_code == 403


def test_picture_that_is_too_large(client, tmp_path):
    from PIL import Image

    for name, side in [("large.png", 4000), ("bomb.png", 6000)]:
        Image.new("1", (side, side)).save(tmp_path / name)
    assert upload(client, tmp_path / "large.png")[0]["label"]
    with pytest.raises(AppError, match="exceeds limit"):
        upload(client, tmp_path / "bomb.png")


def test_uploads_are_private_and_removed(run, tmp_path):
    command = [sys.executable, "-m", "cifarnet.demo", str(run), *CPU, "pictures=0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        address = demo.stdout.readline().split()[1]
        (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"picture")}).json()
        (folder,) = tmp_path.glob("cifarnet-demo-*")
        assert folder in Path(path).parents
        assert Path(path).read_bytes() == b"picture"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 143
        assert demo.stderr.read() == "Stopped by SIGTERM.\n"
    assert list(tmp_path.iterdir()) == []


def test_example_pictures(run, tmp_path):
    classifier = cifarnet.load(run)
    overrides = ["data=synthetic", "data.test_size=60", "data.train_size=300", *CPU]
    data = test_images.load("demo", overrides, classifier.checkpoint, [])
    images = test_images.sample(data.source.test, 1000)
    examples = choose(classifier, *images, 6, tmp_path, {"accelerator": "cpu"})
    captions = [caption for _, caption in examples]
    assert len(set(path for path, _ in examples)) == 6
    mistakes = captions[-2:]
    assert all(", predicted " in caption for caption in mistakes)
    confidences = [int(caption.rpartition("(")[2].rstrip("%)")) for caption in captions if "predicted" in caption]
    assert sorted(confidences)[-1] == int(
        mistakes[0].rpartition("(")[2].rstrip("%)")
    )  # the most confident mistake comes first
    for path, caption in examples:
        (answer,) = classifier.predict(path, accelerator="cpu")
        assert answer.label == (caption.partition("predicted ")[2].partition(" (")[0] or caption)


def test_page_without_test_pictures(changed, capsys):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["data"] = {"_target_": "cifarnet.data.ImageFolder", "root": "/nowhere"}

    path = str(changed(alter))
    with serving([path], CPU):
        assert "No test pictures to choose from: " in capsys.readouterr().out
    with pytest.raises(UserError, match="data"), serving([path], [*CPU, "data.root=nowhere"]):
        pass


def test_bad_settings(run, changed, command, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, _, err = command(str(run), f"port={port}", "pictures=0", main=main)
    assert (status, f"port={port}: Address already in use" in err) == (1, True), err
    for host in ("nosuch.invalid", "192.0.2.1"):
        begin = time.monotonic()
        status, _, err = command(str(run), f"host={host}", "pictures=0", main=main)
        assert (status, err.count("\n"), f"host={host}" in err, "host=127.0.0.1" in err) == (1, 1, True, True), err
        assert time.monotonic() - begin < 10
    for setting, message in {
        "port=0": "port=0 is out of range",
        "upload_limit=0": "upload_limit=0",
        "tta=x": "tta=x",
    }.items():
        status, _, err = command(str(run), setting, main=main)
        assert (status, message in err) == (1, True), err

    def alter(checkpoint):
        checkpoint["hyper_parameters"]["model"]["_target_"] = "os.system"

    assert "names the class os.system" in command(str(changed(alter)), main=main)[2]
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert "pip install 'cifarnet[demo]'" in command(str(run), main=main)[2]
