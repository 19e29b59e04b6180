"""The demo's page agrees with `predict`, and works without test pictures."""

import socket

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import cifarnet
from cifarnet.demo import analyze, choose, main, serving
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
            assert probabilities(label) == pytest.approx(expected.probabilities, abs=1e-6), path.name
            assert label["label"] == expected.label


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


def test_folder_of_uploads_is_refused(run, tmp_path):
    picture(tmp_path / "somebodys.png")
    with pytest.raises(UserError, match="is not a file"):
        analyze(cifarnet.load(run), str(tmp_path), {"accelerator": "cpu"})


def test_example_pictures(run, tmp_path):
    classifier = cifarnet.load(run)
    overrides = ["data=synthetic", "data.test_size=60", "data.train_size=300", *CPU]
    images = test_images.read("demo", overrides, classifier.checkpoint, [], 1000)
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
    assert (status, f"port={port}: the port is in use" in err) == (1, True), err
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
