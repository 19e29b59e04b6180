"""The page answers as predict does, serves this machine alone, and does without what is not there."""

import socket

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import cifarnet
from cifarnet import checkpoint, cli, demo
from cifarnet.demo import choose, main, serving
from cifarnet.errors import UserError
from conftest import picture
from test_predict import odd_pictures

CPU = ["accelerator=cpu", "pictures=6"]


@pytest.fixture(scope="module")
def client(run):
    with serving([str(run), str(run / "checkpoints/last.ckpt")], [*CPU, "upload_limit=0.5"]) as address:
        assert address.startswith("http://127.0.0.1:")
        yield Client(address, verbose=False)


def asked(client, path):
    return client.predict(handle_file(str(path)), api_name="/answer")


def shares(label) -> dict[str, float]:
    return {row["label"]: row["confidence"] for row in label["confidences"]}


def test_the_same_picture_gets_the_same_answer_as_in_predict(client, run, tmp_path):
    """Of every odd kind, and of two networks."""
    for path in odd_pictures(tmp_path):
        first, _, _, second, _, _ = asked(client, path)
        for label, trained in [(first, run), (second, run / "checkpoints/last.ckpt")]:
            (expected,) = cifarnet.load(trained).predict(path, accelerator="cpu")
            assert shares(label) == pytest.approx(expected.probabilities, abs=1e-6), path.name
            assert label["label"] == expected.label


def test_a_test_picture_is_shown_enlarged(client, tmp_path):
    picture(tmp_path / "a.png")
    _, seen, looked, *_ = asked(client, tmp_path / "a.png")
    from PIL import Image

    assert Image.open(seen).size == Image.open(looked).size == (256, 256)
    assert Image.open(seen).convert("RGB").getpixel((9, 9)) == (10, 20, 30)


def test_what_is_no_picture_is_told(client, tmp_path):
    path = tmp_path / "cut.png"
    picture(path, size=(300, 300))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(AppError, match=r"This picture cannot be read as an image .*Repair or remove it"):
        asked(client, path)
    tmp_path.joinpath("text.png").write_text("no picture")
    with pytest.raises(AppError, match=r"This picture cannot be read as an image \(of no kind that Pillow knows"):
        asked(client, tmp_path / "text.png")
    tmp_path.joinpath("large.bmp").write_bytes(bytes(2**20))
    with pytest.raises(Exception, match="exceeds the maximum file size of 524288 bytes"):
        asked(client, tmp_path / "large.bmp")


def test_a_folder_of_uploads_is_no_picture(run, tmp_path):
    picture(tmp_path / "somebodys.png")
    with pytest.raises(UserError, match="This picture is no file"):
        demo.shown(cifarnet.load(run), str(tmp_path), cli.compose("demo", CPU))


def test_pictures_to_choose_from(run, tmp_path):
    classifier = cifarnet.load(run)
    overrides = ["data=synthetic", "data.test_size=60", "data.train_size=300", *CPU]
    content = checkpoint.read(run / "checkpoints/best.ckpt")
    examples = choose(classifier, content, cli.compose("demo", overrides), tmp_path)
    captions = [caption for _, caption in examples]
    assert len(set(path for path, _ in examples)) == 6
    mistakes = captions[-2:]
    assert all(", taken for " in caption for caption in mistakes)
    sure = [int(caption.rpartition("(")[2].rstrip("%)")) for caption in captions if "taken" in caption]
    assert sorted(sure)[-1] == int(mistakes[0].rpartition("(")[2].rstrip("%)"))  # the surest comes first of them
    for path, caption in examples:
        (answer,) = classifier.predict(path, accelerator="cpu")
        assert answer.label == (caption.partition("taken for ")[2].partition(" (")[0] or caption)


def test_without_its_images_there_is_nothing_to_choose_from(changed, capsys):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["config"]["data"] |= {
            "_target_": "cifarnet.data.ImageFolder",
            "root": "/nowhere",
        }

    path = str(changed(alter))
    with serving([path], CPU):
        assert "No test pictures to choose from: " in capsys.readouterr().out
    with pytest.raises(UserError, match="data"), serving([path], [*CPU, "data.root=nowhere"]):
        pass


def test_what_cannot_be_used(run, changed, command, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, _, err = command(str(run), f"port={port}", "pictures=0", main=main)
    assert (status, f"port={port} cannot be served" in err) == (1, True), err
    for setting, told in {
        "port=0": "port=0: give",
        "upload_limit=0": "upload_limit=0: give",
        "tta=x": "choose one",
    }.items():
        status, _, err = command(str(run), setting, main=main)
        assert (status, told in err) == (1, True), err

    def alter(checkpoint):
        checkpoint["hyper_parameters"]["config"]["model"]["_target_"] = "os.system"

    assert "asks for the class os.system" in command(str(changed(alter)), main=main)[2]
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert "pip install 'cifarnet[demo]'" in command(str(run), main=main)[2]
