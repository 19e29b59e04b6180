"""Pictures in, probabilities out: each odd kind of file, what cannot be read, what a stranger's checkpoint may do."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cifarnet
from cifarnet.data import ImageFolder, pixels
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate
from cifarnet.evaluation import figures
from cifarnet.inference import decoding
from cifarnet.inference.predictor import Predictor
from cifarnet.predict import main
from conftest import picture


@pytest.fixture
def classifier(run):
    return cifarnet.load(run)


@pytest.fixture
def predict(command, run):
    """Run `python -m cifarnet.predict RUN …`: exit status, what was printed, and to stderr."""
    return lambda *arguments: command(str(run), *map(str, arguments), "accelerator=cpu", main=main)


def odd_pictures(folder: Path) -> list[Path]:
    """A smooth picture, wider than high, as a file of each odd kind."""
    ys, xs = np.mgrid[:60, :90]
    rgb = Image.fromarray(np.stack([xs * 2, ys * 3, 200 - xs], -1).astype(np.uint8))
    grey = rgb.convert("L")
    turned = Image.Exif()
    turned[274] = 6  # to be turned clockwise
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray((255 * (xs > 20)).astype(np.uint8)))
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {
        "plain.png": (rgb, {}),
        "photo.JPG": (rgb, {}),
        "grey.png": (grey, {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "alpha.png": (alpha, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "deep.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
        "turned.jpg": (rgb.transpose(Image.Transpose.ROTATE_90), {"exif": turned}),
        "moving.gif": (rgb, {"save_all": True, "append_images": [Image.new("RGB", rgb.size)]}),
        "moving.webp": (rgb, {"save_all": True, "append_images": [Image.new("RGB", rgb.size)], "lossless": True}),
        "tiff.tif": (rgb, {}),
        "bitmap.bmp": (rgb, {}),
        "bits.png": (rgb.convert("1"), {}),
    }
    for name, (image, settings) in kinds.items():
        image.save(folder / name, **settings)
    return sorted(folder.iterdir())


def huge_png(path: Path, side: int) -> None:
    """A file of some bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_a_picture_gets_the_same_answer_as_in_evaluate(classifier, run, tmp_path):
    """From file to logits, of every kind: evaluate's data and its Predictor against predict's."""
    files = odd_pictures(tmp_path / "tree/test/disc")
    picture(tmp_path / "tree/test/ring/a.png")
    for name in ("disc", "ring"):
        picture(tmp_path / "tree/train" / name / "a.png")
    images = ImageFolder(str(tmp_path / "tree"), val_fraction=0).source.test.images[: len(files)]
    for tta in ("none", "mirror_translate"):
        _, expected = Predictor(cifarnet.load(run).network, tta=tta, accelerator="cpu")(images)
        with warnings.catch_warnings(action="error"):
            answers = list(classifier.answers([str(path) for path in files], tta=tta, accelerator="cpu"))
        assert [answer.source for answer in answers] == [str(path) for path in files]
        torch.testing.assert_close(torch.stack([answer.logits for answer in answers]), expected, rtol=0, atol=1e-5)
    assert len({tuple(image.flatten().tolist()) for image in images}) > 6  # pictures that differ


def test_kinds_of_one_picture_are_one_picture(tmp_path):
    shown = {path.name: np.asarray(pixels.decode(str(path), 32)).astype(int) for path in odd_pictures(tmp_path / "odd")}
    for name in ("bitmap.bmp", "tiff.tif", "moving.webp"):
        assert np.array_equal(shown[name], shown["plain.png"]), name
    for name in ("photo.JPG", "turned.jpg", "cmyk.jpg", "moving.gif"):
        assert abs(shown[name] - shown["plain.png"]).mean() < 8, name
    assert np.array_equal(shown["deep.png"], shown["grey.png"])
    assert (shown["alpha.png"][:, 0] == 255).all()  # the crop is of columns 15 to 75
    assert np.array_equal(shown["alpha.png"][:, 8:], shown["plain.png"][:, 8:])


def test_files_images_and_arrays_of_one_picture(classifier, tmp_path):
    path = odd_pictures(tmp_path / "odd")[-3]
    image = Image.open(path)
    array = np.asarray(image.convert("RGB"))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    several = [path, str(path), image, array, tensor, array / 255, tensor / 255]
    predictions = classifier.predict(several, accelerator="cpu")
    assert len({(of.label, round(of.probability, 5)) for of in predictions}) == 1
    assert [of.source for of in predictions] == [str(path)] * 2 + [None] * 5
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1)
    assert set(predictions[0].probabilities) == set(classifier.class_names)
    assert max(predictions[0].probabilities.values()) == predictions[0].probability
    for one in (str(path), path, image, array, tensor):
        assert len(classifier.predict(one, accelerator="cpu")) == 1
    assert [of.source for of in classifier.predict(path.parent)] == sorted(map(str, path.parent.iterdir()))
    assert len(classifier.predict(torch.stack([tensor] * 3), accelerator="cpu")) == 3
    assert classifier.predict([]) == []


def test_the_network_s_own_tensors_get_the_network_s_own_answers(classifier):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, names = classifier
    with torch.no_grad():
        expected = network(images).softmax(1)
    predictions = classifier.predict(images, tta="none", accelerator="cpu")
    for row, of in zip(expected, predictions, strict=True):
        torch.testing.assert_close(torch.tensor([of.probabilities[name] for name in names]), row, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((3, 8, 8), np.uint8), torch.zeros(8, 8, 3), np.zeros((8, 8), int), np.full((8, 8, 3), 2.0), [1], 3.0],
    ids=repr,
)
def test_what_is_no_picture_is_told(classifier, wrong):
    with pytest.raises(UserError, match="is no image: give "):
        classifier.predict(wrong if isinstance(wrong, list) else [wrong])


def test_one_picture_or_a_folder_is_as_good_as_a_list(classifier, tmp_path):
    picture(tmp_path / "a.png")
    of_list = [answer.logits for answer in classifier.answers([tmp_path / "a.png"])]
    for given in (str(tmp_path / "a.png"), tmp_path):
        assert torch.equal(next(classifier.answers(given)).logits, of_list[0])
    with pytest.raises(UserError, match="A NoneType is no image: give a path"):
        classifier.predict(None)
    with pytest.raises(ValueError, match=r"\[3, 32, 32\] are no batch: give \[B, C, H, W\]"):
        classifier.network(torch.zeros(3, 32, 32))


def test_load_is_still_a_pair(run):
    loaded = cifarnet.load(run)
    network, names = loaded
    assert (loaded[0], loaded[1]) == (loaded.network, loaded.class_names) == (network, names)
    assert len(loaded) == 2
    assert not network.training
    before = {key: value.stride() for key, value in network.state_dict().items()}
    loaded.predict(np.zeros((32, 32, 3), np.uint8))
    assert {key: value.stride() for key, value in network.state_dict().items()} == before  # not channels_last since


def test_the_rest_goes_on(predict, tmp_path):
    """The folder of the odd files: text, nothing in it, too large, cut short, no file at all."""
    folder = tmp_path / "pictures"
    good = [path.name for path in odd_pictures(folder)]
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.png").touch()
    huge_png(folder / "huge.png", 20_000)
    (folder / "short.jpg").write_bytes((folder / "photo.JPG").read_bytes()[:700])
    os.mkfifo(folder / "pipe.png")
    (folder / "lost.png").symlink_to("nowhere")
    (folder / "again").symlink_to(folder)
    (folder / "notes.txt").write_text("no image, and no mistake")
    status, printed, error = predict(folder, folder / "missing.png", "top=1")
    assert status == 1
    assert [Path(line.split("  ")[0].strip()).name for line in printed.splitlines()] == good
    lines = error.splitlines()
    for name, told in {
        "text.jpg": "of no kind that Pillow knows",
        "empty.png": "it is empty",
        "huge.png": "has more than 178,956,970 pixels",
        "short.jpg": "truncated",
        "pipe.png": "is no file",
        "lost.png": "is no file",
        "missing.png": "There is no file",
    }.items():
        assert len([line for line in lines if name in line and told in line]) == 1, name
    assert lines[-1].startswith(f"Error: 7 of {len(good) + 7} could not be read")
    assert len(lines) == 8


def test_all_were_read(predict, tmp_path):
    files = odd_pictures(tmp_path / "pictures")
    status, printed, error = predict(*files, "batch_size=4", "workers=2")
    assert (status, error) == (0, "")
    assert len(printed.splitlines()) == len(files)
    for line, path in zip(printed.splitlines(), files, strict=True):
        assert line.startswith(str(path))
        assert line.count("%") == 3
    assert predict(*files, "batch_size=1", "workers=1", "top=2")[1].count("%") == 2 * len(files)


@pytest.mark.parametrize(
    "name", ["a b'c\"d.png", "two\nlines.png", "top=1.png", "~all.png", "+x=[1].png", "\x1b[31m.png"]
)
def test_a_path_is_taken_literally(predict, tmp_path, name):
    picture(tmp_path / name)
    picture(tmp_path / "folder" / name)
    status, printed, error = predict(name, tmp_path / "folder")
    assert (status, error) == (0, "")
    assert len(printed.splitlines()) == 2
    assert "\x1b" not in printed
    assert name.replace("\n", "\\n").replace("\x1b", "\\x1b") in printed


def test_names_of_any_bytes(predict, tmp_path):
    picture(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / "b\udcfe.png").write_bytes(b"broken")
    status, printed, error = predict(*sorted(map(str, tmp_path.glob("*.png"))))
    assert status == 1
    assert "\\udcff.png" in printed
    assert "b\\udcfe.png cannot be read" in error
    assert predict(*tmp_path.glob("*.png"), "output=a.csv")[0] == 1
    assert b"/\xff.png," in (tmp_path / "a.csv").read_bytes()


def test_files_of_answers(predict, classifier, tmp_path):
    files = [str(path) for path in odd_pictures(tmp_path / "odd, \n'pictures'")]
    (tmp_path / "broken.png").write_bytes(b"broken")
    status, printed, _ = predict(*files, "broken.png", "output=deep/answers.csv", "top=2")
    assert status == 1
    assert printed == f"deep/answers.csv: {len(files) + 1} rows\n"
    with open("deep/answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [row["file"] for row in rows] == [*files, "broken.png"]
    assert "cannot be read" in rows[-1]["error"]
    assert rows[-1]["class_1"] == ""
    expected = classifier.predict(files, accelerator="cpu")
    for row, of in zip(rows, expected, strict=False):
        assert row["class_1"] == of.label
        assert float(row["probability_1"]) == pytest.approx(of.probability, abs=1e-5)

    predict(*files, "broken.png", "output=answers.json", "top=null", "temperature=2")
    kept = json.loads((tmp_path / "answers.json").read_text())
    assert (kept["tta"], kept["precision"], kept["temperature"]) == ("mirror", "32-true", 2)
    for row, of in zip(kept["predictions"], expected, strict=False):
        assert row["error"] is None
        assert [answer["class"] for answer in row["top"]] == list(of.probabilities)
        assert row["top"][0]["probability"] < of.probability
    assert kept["predictions"][-1]["top"] == []


def test_the_temperature_is_evaluate_s(run, predict, changed, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    classifier = cifarnet.load(tmp_path / "copy")
    with pytest.raises(UserError, match=r"there is no .*Fit one: python -m cifarnet\.evaluate"):
        classifier.temperature("evaluation")
    measured = evaluate(tmp_path / "copy", ["corruptions=false", "accelerator=cpu"])
    assert classifier.temperature("evaluation") == measured["temperature"] != 1
    image = np.full((32, 32, 3), 90, np.uint8)
    one, cooled = (classifier.predict(image, temperature=of)[0] for of in (None, "evaluation"))
    logits = next(classifier.answers([image])).logits.double()
    assert one.probability == pytest.approx(logits.softmax(0).max().item())
    assert cooled.probability == pytest.approx((logits / measured["temperature"]).softmax(0).max().item())
    with pytest.raises(UserError, match=r"with tta=mirror, and this is .* with tta=none\. Fit it anew.* tta=none"):
        classifier.predict(image, temperature="evaluation", tta="none")
    with pytest.raises(UserError, match=r"fitted to best\.ckpt"):
        cifarnet.load(tmp_path / "copy/checkpoints/last.ckpt").temperature("evaluation")
    record = tmp_path / "copy/evaluation/metrics.json"
    for content, told in {"{": "is damaged", "[]": "is damaged", '{"tta": "mirror"}': "is damaged"}.items():
        record.write_text(content)
        with pytest.raises(UserError, match=told):
            classifier.temperature("evaluation")
    for wrong in (0, -1, float("nan"), float("inf"), "hot", True):
        with pytest.raises(UserError, match="give a number above 0, or evaluation"):
            classifier.temperature(wrong)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        ([], 1, "Name pictures too"),
        (["empty"], 1, "Error: There are no images (.png, .jpg, .gif, .tif, .webp, …) in empty."),
        (["a.png", "ttta=mirror"], 1, "Did you mean tta?"),
        (["a.png", "tta=rotate"], 1, "tta=rotate: choose one of none, mirror"),
        (["a.png", "top=0"], 1, "top=0: give a number from 1"),
        (["a.png", "top=many"], 1, "top=many has the wrong type"),
        (["a.png", "workers=0"], 1, "workers=0: give a number from 1 to 512"),
        (["a.png", "batch_size=0"], 1, "batch_size=0"),
        (["a.png", "temperature=0"], 1, "temperature=0: give a number above 0"),
        (["a.png", "temperature=hot"], 1, "temperature=hot: give a number above 0"),
        (["a.png", "precision=bf8"], 1, "precision=bf8"),
        (["a.png", "output=a.png"], 1, "output=a.png: name a file that ends with .csv or .json"),
        (["a.png", "output=a.png/b.csv"], 1, "output=a.png/b.csv cannot be written"),
        (["a.png", "--batch-size=3"], 2, "Settings have no dashes: batch_size=3 ("),
        (["a.png", "--top", "3"], 2, "--top is no flag. Settings have no dashes: top=… (and"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_line(predict, tmp_path, arguments, status, told):
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    ended, printed, error = predict(*arguments)
    assert (ended, printed) == (status, "")
    assert told in error
    assert error.count("\n") == status  # after how it is used, where that is wrong


def test_a_run_that_is_not_named_first(command, run, tmp_path):
    picture(tmp_path / "pictures/a.png")
    for first in ("pictures", "pictures/a.png"):
        status, _, error = command(first, str(run), main=main)
        assert (status, f"If {run} is the run, name it first, and pictures after it." in error) == (1, True), error
    (tmp_path / "pictures/checkpoints").mkdir()
    assert command(str(run), str(tmp_path / "pictures"), "accelerator=cpu", main=main)[0] == 0


def test_libraries_say_nothing(run, tmp_path):
    """In a process of its own: Lightning would tell the precision."""
    picture(tmp_path / "a.png")
    program = [sys.executable, "-m", "cifarnet.predict", run, tmp_path / "a.png", "accelerator=cpu"]
    result = subprocess.run([*program, "precision=bf16-mixed"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(str(tmp_path / "a.png"))
    code = f"import cifarnet; cifarnet.load({str(run)!r}).predict({str(tmp_path / 'a.png')!r}, precision='bf16-mixed')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_empty_folder_among_others_is_told(predict, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    status, printed, error = predict("empty", "a.png")
    assert (status, error) == (0, "There are no images in empty.\n")
    assert len(printed.splitlines()) == 1


def test_a_folder_that_cannot_be_read_is_told(predict, tmp_path, monkeypatch):
    picture(tmp_path / "all/locked/a.png")
    picture(tmp_path / "all/open/a.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(pixels.os, "scandir", refuse)
    status, printed, error = predict("all")
    assert status == 1
    assert printed.startswith("all/open/a.png")
    assert "all/locked cannot be read (Permission denied)." in error
    assert "1 of 2 could not be read" in error


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """However many threads there are; small ones are not."""
    monkeypatch.setattr(pixels, "LARGE", 100)
    original, both, at_work, most = pixels.fitted, threading.Lock(), set(), {}

    def watch(image, size):
        with both:
            at_work.add(threading.get_ident())
            most[image.width] = max(most.get(image.width, 0), len(at_work))
        threading.Event().wait(0.02)
        with both:
            at_work.discard(threading.get_ident())
        return original(image, size)

    monkeypatch.setattr(pixels, "fitted", watch)
    for side, expected in [(11, 1), (10, 2)]:
        for i in range(16):
            picture(tmp_path / f"{side}/{i:02}.png", size=(side, side))
        files = sorted(map(str, (tmp_path / str(side)).iterdir()))
        assert [source for source, _ in decoding.decoded(files, 8, 16, 4)] == files
        assert (most[side] == 1) == (expected == 1), most


def test_only_so_many_wait_to_be_taken(monkeypatch):
    """A network slower than decoding does not fill the memory."""
    begun = []
    monkeypatch.setattr(pixels, "fitted", lambda image, size: begun.append(1) or Image.new("RGB", (size, size)))
    images = [np.zeros((4, 4), np.uint8)] * 4000
    answers = decoding.decoded(images, 4, 50, 2)
    next(answers)
    threading.Event().wait(0.3)
    assert len(begun) <= 2 * 50 + 16 * 3
    assert len(list(answers)) == 3999


class Bomb:
    """What a stranger would have pickle run."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (lambda checkpoint: checkpoint.update(extra=Bomb()), "Such could run code: nothing of it was loaded"),
        (
            lambda checkpoint: checkpoint["hyper_parameters"]["config"].update(
                model={"_target_": "os.mkdir", "path": "exploded"}
            ),
            "the class os.mkdir, which is no class that this project lists",
        ),
        (lambda checkpoint: checkpoint["hyper_parameters"].update(image_size=10**6), "image_size=1000000: give a num"),
        (lambda checkpoint: checkpoint["hyper_parameters"].update(precision="x"), "precision=x"),
        (lambda checkpoint: checkpoint["state_dict"]["network.normalize.mean"].fill_(torch.nan), "no"),
    ],
    ids=["pickle", "class", "size", "precision", "nan"],
)
def test_a_stranger_s_checkpoint_runs_nothing(command, changed, tmp_path, alter, told):
    picture(tmp_path / "a.png")
    status, printed, error = command(str(changed(alter)), "a.png", "accelerator=cpu", main=main)
    assert (status, printed) == (1, "")
    assert told in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["a.png", "changed.ckpt"]


def test_names_of_a_stranger_command_no_terminal(command, changed, tmp_path):
    picture(tmp_path / "a.png")
    names = ["\x1b]0;owned\x07", "two\nlines", *"abcdefgh"]

    def rename(checkpoint):
        count = len(checkpoint["hyper_parameters"]["class_names"])
        checkpoint["hyper_parameters"]["class_names"] = names[:count]

    status, printed, _ = command(str(changed(rename)), "a.png", "top=null", "accelerator=cpu", main=main)
    assert status == 0
    assert "\\x1b]0;owned\\x07" in printed
    assert "two\\nlines" in printed
    assert len(printed.splitlines()) == 1


def test_where_the_network_looked(predict, run, tmp_path):
    for path in (tmp_path / "a/cat.png", tmp_path / "b/cat.jpg", tmp_path / "b" / f"{'ä' * 120}.png"):
        picture(path)
    (tmp_path / "b/empty.png").touch()
    status, out, err = predict(tmp_path / "a", tmp_path / "b", "explain=true")
    assert status == 1
    assert "empty.png cannot be read" in err
    folder = Path(out.rpartition("Where the network looked: ")[2].strip())
    assert sorted(path.name for path in folder.iterdir()) == ["cat.png", "cat_2.png", f"{'ä' * 75}.png"]
    assert folder.resolve().parent == (run / "explained").resolve()
    assert Image.open(folder / "cat.png").width == 1080


def test_an_explanation_shows_names_as_text(classifier):
    ranked = [("$\\frac$ <b>", 0.9), ("b" * 30, 0.1)]
    figure = figures.explained(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32)), ranked, "$\\frac$ <b>.png")
    assert figure.get_suptitle() == "$\\frac$ <b>.png"
    assert figures.as_image(figure).any()
