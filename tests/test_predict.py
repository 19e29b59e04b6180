"""Prediction: image files of all kinds, files that cannot be read, and checkpoints that cannot be trusted."""

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
from cifarnet.build import make_data
from cifarnet.data import ImageFolder, decoding, pixels
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate
from cifarnet.inference import test_images
from cifarnet.inference.predictor import Predictor
from cifarnet.predict import main
from cifarnet.train import train
from conftest import picture


@pytest.fixture
def classifier(run):
    return cifarnet.load(run)


@pytest.fixture
def predict(command, run):
    """Run `python -m cifarnet.predict RUN …`, and return its exit status, stdout and stderr."""
    return lambda *arguments: command(str(run), *map(str, arguments), "accelerator=cpu", main=main)


def odd_pictures(folder: Path) -> list[Path]:
    """Write a smooth picture, wider than high, as files of many kinds."""
    ys, xs = np.mgrid[:60, :90]
    rgb = Image.fromarray(np.stack([xs * 2, ys * 3, 200 - xs], -1).astype(np.uint8))
    grey = rgb.convert("L")
    turned = Image.Exif()
    turned[274] = 6  # rotate clockwise
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
    """Write a small file whose header declares a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_same_logits_as_in_evaluate(classifier, run, tmp_path):
    """For every kind of file, `ImageFolder` and `Predictor` give the same logits as `Trained.answers`."""
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
    assert len({tuple(image.flatten().tolist()) for image in images}) > 6  # the pictures differ


def test_all_kinds_of_a_picture_look_the_same(tmp_path):
    decoded = {
        path.name: np.asarray(pixels.decode(str(path), 32)).astype(int) for path in odd_pictures(tmp_path / "odd")
    }
    for name in ("bitmap.bmp", "tiff.tif", "moving.webp"):
        assert np.array_equal(decoded[name], decoded["plain.png"]), name
    for name in ("photo.JPG", "turned.jpg", "cmyk.jpg", "moving.gif"):
        assert abs(decoded[name] - decoded["plain.png"]).mean() < 8, name
    assert np.array_equal(decoded["deep.png"], decoded["grey.png"])
    assert (decoded["alpha.png"][:, 0] == 255).all()  # the crop consists of columns 15 to 75
    assert np.array_equal(decoded["alpha.png"][:, 8:], decoded["plain.png"][:, 8:])


def test_files_images_and_arrays(classifier, tmp_path):
    path = odd_pictures(tmp_path / "odd")[-3]
    image = Image.open(path)
    array = np.asarray(image.convert("RGB"))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    several = [path, str(path), image, array, tensor, array / 255, tensor / 255]
    predictions = classifier.predict(several, accelerator="cpu")
    assert len({(prediction.label, round(prediction.probability, 5)) for prediction in predictions}) == 1
    assert [prediction.source for prediction in predictions] == [str(path)] * 2 + [None] * 5
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1)
    assert set(predictions[0].probabilities) == set(classifier.class_names)
    assert max(predictions[0].probabilities.values()) == predictions[0].probability
    for single in (str(path), path, image, array, tensor):
        assert len(classifier.predict(single, accelerator="cpu")) == 1
    assert [prediction.source for prediction in classifier.predict(path.parent)] == sorted(
        map(str, path.parent.iterdir())
    )
    assert len(classifier.predict(torch.stack([tensor] * 3), accelerator="cpu")) == 3
    assert classifier.predict([]) == []


def test_predictions_equal_the_networks_outputs(classifier):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, names = classifier
    with torch.no_grad():
        expected = network(images).softmax(1)
    predictions = classifier.predict(images, tta="none", accelerator="cpu")
    for row, prediction in zip(expected, predictions, strict=True):
        probabilities = torch.tensor([prediction.probabilities[name] for name in names])
        torch.testing.assert_close(probabilities, row, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((3, 8, 8), np.uint8), torch.zeros(8, 8, 3), np.zeros((8, 8), int), np.full((8, 8, 3), 2.0), [1], 3.0],
    ids=repr,
)
def test_values_that_are_not_pictures(classifier, wrong):
    with pytest.raises(UserError, match="is not an image"):
        classifier.predict(wrong if isinstance(wrong, list) else [wrong])


def test_a_path_and_a_folder_instead_of_a_list(classifier, tmp_path):
    picture(tmp_path / "a.png")
    expected = [answer.logits for answer in classifier.answers([tmp_path / "a.png"])]
    for pictures in (str(tmp_path / "a.png"), tmp_path):
        assert torch.equal(next(classifier.answers(pictures)).logits, expected[0])
    with pytest.raises(UserError, match="is not an image"):
        classifier.predict(None)
    with pytest.raises(ValueError, match=r"\[3, 32, 32\]"):
        classifier.network(torch.zeros(3, 32, 32))


def test_load_returns_a_pair(run):
    loaded = cifarnet.load(run)
    network, names = loaded
    assert (loaded[0], loaded[1]) == (loaded.network, loaded.class_names) == (network, names)
    assert len(loaded) == 2
    assert not network.training
    before = {key: value.stride() for key, value in network.state_dict().items()}
    loaded.predict(np.zeros((32, 32, 3), np.uint8))
    assert {
        key: value.stride() for key, value in network.state_dict().items()
    } == before  # it is not in channels_last format


def test_unreadable_files_among_others(predict, tmp_path):
    folder = tmp_path / "pictures"
    good = [path.name for path in odd_pictures(folder)]
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").touch()
    huge_png(folder / "huge.png", 20_000)
    (folder / "short.jpg").write_bytes((folder / "photo.JPG").read_bytes()[:700])
    os.mkfifo(folder / "pipe.png")
    (folder / "lost.png").symlink_to("nowhere")
    (folder / "again").symlink_to(folder)
    (folder / "notes.txt").write_text("ignored")
    status, printed, error = predict(folder, folder / "missing.png", "top=1")
    assert status == 1
    assert [Path(line.split("  ")[0].strip()).name for line in printed.splitlines()] == good
    lines = error.splitlines()
    for name in ("text.jpg", "empty.png", "huge.png", "short.jpg", "pipe.png", "lost.png", "missing.png"):
        assert len([line for line in lines if name in line and "cannot be read" in line]) == 1, name
    assert lines[-1].startswith(f"Error: 7 of {len(good) + 7} pictures could not be read")
    assert len(lines) == 8


def test_all_files_are_readable(predict, tmp_path):
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
def test_paths_with_special_characters(predict, tmp_path, name):
    picture(tmp_path / name)
    picture(tmp_path / "folder" / name)
    status, printed, error = predict(name, tmp_path / "folder")
    assert (status, error) == (0, "")
    assert len(printed.splitlines()) == 2
    assert "\x1b" not in printed
    assert name.replace("\n", "\\n").replace("\x1b", "\\x1b") in printed


def test_names_that_are_not_utf8(predict, tmp_path):
    picture(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / "b\udcfe.png").write_bytes(b"broken")
    status, printed, error = predict(*sorted(map(str, tmp_path.glob("*.png"))))
    assert status == 1
    assert "\\udcff.png" in printed
    assert "b\\udcfe.png cannot be read" in error
    assert predict(*tmp_path.glob("*.png"), "output=a.csv")[0] == 1
    assert b"/\xff.png," in (tmp_path / "a.csv").read_bytes()


def test_output_files(predict, classifier, tmp_path):
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
    for row, prediction in zip(rows, expected, strict=False):
        assert row["class_1"] == prediction.label
        assert float(row["probability_1"]) == pytest.approx(prediction.probability, abs=1e-5)

    predict(*files, "broken.png", "output=answers.json", "top=null", "temperature=2")
    content = json.loads((tmp_path / "answers.json").read_text())
    assert (content["tta"], content["precision"], content["temperature"]) == ("mirror", "32-true", 2)
    for row, prediction in zip(content["predictions"], expected, strict=False):
        assert row["error"] is None
        assert [answer["class"] for answer in row["top"]] == list(prediction.probabilities)
        assert row["top"][0]["probability"] < prediction.probability
    assert content["predictions"][-1]["top"] == []


def test_temperature_of_the_evaluation(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    classifier = cifarnet.load(copy)
    with pytest.raises(UserError, match=r"no temperature was fitted .*python -m cifarnet\.evaluate .* tta=mirror"):
        classifier.temperature("evaluation")
    measured = evaluate(copy, ["corruptions=false", "accelerator=cpu"])
    assert classifier.temperature("evaluation") == measured["temperature"] != 1
    image = np.full((32, 32, 3), 90, np.uint8)
    plain, calibrated = (classifier.predict(image, temperature=value)[0] for value in (None, "evaluation"))
    logits = next(classifier.answers([image])).logits.double()
    assert plain.probability == pytest.approx(logits.softmax(0).max().item())
    assert calibrated.probability == pytest.approx((logits / measured["temperature"]).softmax(0).max().item())
    with pytest.raises(UserError, match="with tta=none"):
        classifier.predict(image, temperature="evaluation", tta="none")
    with pytest.raises(UserError, match=r"fitted to .*last\.ckpt"):
        cifarnet.load(copy / "checkpoints/last.ckpt").temperature("evaluation")
    record = copy / "evaluation/metrics.json"
    for content in ("{", "[]", '{"tta": "mirror"}'):
        record.write_text(content)
        with pytest.raises(UserError, match=r"metrics\.json cannot be read"):
            classifier.temperature("evaluation")
    for wrong in (0, -1, float("nan"), float("inf"), "hot", True):
        with pytest.raises(UserError, match=f"temperature={wrong}"):
            classifier.temperature(wrong)


@pytest.fixture(scope="module")
def evaluated_run(run, tmp_path_factory):
    """A copy of the run, its evaluation with alpha=0.2, and its test images as files."""
    folder = tmp_path_factory.mktemp("evaluated")
    copy = shutil.copytree(run, folder / "run")
    measured = evaluate(copy, ["corruptions=false", "accelerator=cpu", "tta=none", "alpha=0.2"])
    images = make_data(test_images.compose("evaluate", [], cifarnet.load(copy).checkpoint, [])).source.test.images
    for i, image in enumerate(images):
        path = folder / f"pictures/{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return copy, measured, folder / "pictures"


def test_conformal_sets_are_those_of_the_evaluation(evaluated_run, command):
    run, measured, pictures = evaluated_run
    with (run / "evaluation/predictions.csv").open(newline="") as file:
        labels = [row["class"] for row in csv.DictReader(file)]
    found = measured["conformal"]["sets"]["LAC"]
    settings = ["conformal=0.2", "tta=none", "accelerator=cpu", "temperature=2"]  # the sets have no temperature
    assert command(str(run), str(pictures), *settings, "output=sets.json", main=main)[0] == 0
    rows = json.loads(Path("sets.json").read_text())["predictions"]
    probabilities = [prediction.probabilities for prediction in cifarnet.load(run).predict(pictures, tta="none")]
    for row, found_here in zip(rows, probabilities, strict=True):
        inside = [name for name, probability in found_here.items() if 1 - probability <= found["threshold"]]
        assert row["conformal_set"] == (inside or list(found_here)[:1])
    covered = sum(label in row["conformal_set"] for label, row in zip(labels, rows, strict=True))
    empty = sum(max(row.values()) < 1 - found["threshold"] for row in probabilities)
    assert empty == found["sizes"][0]
    assert 0 <= covered - round(found["coverage"] * len(rows)) <= empty
    assert len({len(row["conformal_set"]) for row in rows}) > 1

    command(str(run), str(pictures), *settings, "output=sets.csv", "top=1", main=main)
    with open("sets.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "class_1", "probability_1", "conformal_set", "error"]
    assert [row["conformal_set"].split("; ") for row in table] == [row["conformal_set"] for row in rows]
    _, printed, _ = command(str(run), str(pictures), *settings, "top=1", main=main)
    for line, row in zip(printed.splitlines(), rows, strict=True):
        assert line.endswith(f"%  {{{', '.join(row['conformal_set'])}}}")


def test_pictures_that_cannot_be_read_have_no_conformal_set(evaluated_run, command, tmp_path):
    (tmp_path / "broken.png").write_text("broken")
    settings = ["conformal=0.2", "tta=none", "accelerator=cpu", "output=sets.json"]
    assert command(str(evaluated_run[0]), "broken.png", *settings, main=main)[0] == 1
    assert json.loads(Path("sets.json").read_text())["predictions"][0]["conformal_set"] == []


@pytest.mark.parametrize("settings", [["conformal=0.1", "tta=none"], ["conformal=0.2", "tta=mirror"]])
def test_conformal_sets_need_an_evaluation(evaluated_run, command, settings):
    run, _, pictures = evaluated_run
    status, printed, error = command(str(run), str(pictures), *settings, main=main)
    alpha = settings[0].replace("conformal", "alpha")
    assert (status, printed) == (1, "")
    assert error.startswith(f"Error: {settings[0]}: no threshold was fitted to {run}")
    assert error.endswith(
        f"python -m cifarnet.evaluate {run}/checkpoints/best.ckpt {alpha} {settings[1]} corruptions=false\n"
    )


def test_infinite_threshold(evaluated_run, tmp_path):
    """With too few validation images, a set contains all classes; JSON has no infinity."""
    run = shutil.copytree(evaluated_run[0], tmp_path / "run")
    record = json.loads((run / "evaluation/metrics.json").read_text())
    record["conformal"]["sets"]["LAC"]["threshold"] = None
    (run / "evaluation/metrics.json").write_text(json.dumps(record))
    classifier = cifarnet.load(run)
    threshold = classifier.conformal_threshold(0.2, "none")
    assert sorted(classifier.conformal_set(torch.arange(10.0), threshold)) == sorted(classifier.class_names)


@pytest.mark.parametrize("more", [[], ["data.eval_batch_size=70"], ["tta=mirror_translate"]])
def test_predictions_of_test_images_equal_those_of_evaluate(run, command, tmp_path, more):
    settings = ["accelerator=cpu", *more]
    folder = f"output_dir={tmp_path}/evaluation"
    assert command(str(run), "corruptions=false", folder, *settings, main=cifarnet.evaluate.main)[0] == 0
    status, printed, error = command(str(run), "data=test", *settings, "output=rows.csv", main=main)
    assert (status, error) == (0, "")
    expected = (tmp_path / "evaluation/predictions.csv").read_bytes()
    assert Path("rows.csv").read_bytes() == expected
    assert printed == f"rows.csv: {expected.count(b'True') + expected.count(b'False')} rows\n"
    assert command(str(run), "data=test", *settings, main=main)[1] == expected.decode().replace("\r\n", "\n")
    command(str(run), "data=test", *settings, "temperature=2", "output=rows.json", main=main)
    content = json.loads(Path("rows.json").read_text())
    assert (content["temperature"], content["data"][0]) == (2, "data=test")
    for row, line in zip(content["predictions"], csv.DictReader(expected.decode().splitlines()), strict=True):
        assert (row["image"], row["predicted"], str(row["correct"])) == (
            int(line["image"]),
            line["predicted"],
            line["correct"],
        )
        assert row["probability"] < float(line["probability"])


def test_predictions_of_other_test_images(command, config, tmp_path):
    """The names of classes and files can be formulas."""
    for split, count in [("train", 20), ("test", 3)]:
        for name in ("=cat", "dog"):
            for i in range(count):
                picture(tmp_path / "a" / split / name / f"@{i}.png", (10 * i, 50, 200 * (name == "dog")))
    train(config("data=folder", f"data.root={tmp_path}/a", "data.batch_size=16", without="data"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    picture(tmp_path / "b/test/dog/more.png")
    run, expected = str(tmp_path / "run"), [f"test/{name}/@{i}.png" for name in ("=cat", "dog") for i in range(3)]
    status, _, error = command(run, "data=test", main=main)
    assert (status, "Add data.root=…" in error) == (1, True)
    for settings, files in [
        (["data=test", "data.root=a"], expected),
        (["data.root=a"], expected),
        (["data=folder", "data.root=b"], [*expected, "test/dog/more.png"]),
        (["data.root=b", "data.in_memory=false"], [*expected, "test/dog/more.png"]),
    ]:
        status, printed, error = command(run, *settings, "accelerator=cpu", main=main)
        assert status == 0, error
        rows = list(csv.DictReader(line for line in printed.splitlines() if "," in line))
        assert [row["image"] for row in rows] == files
        assert {row["class"] for row in rows} == {"'=cat", "dog"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "data=test"], "a.png cannot be combined with data=test"),
        (["data=test", "top=1"], "top=1 cannot be combined with data=test"),
        (["data.root=x", "conformal=0.1"], "conformal=0.1 cannot be combined with data.root=x"),
        (["data=tset"], "data=tset does not exist"),
        (["data=test", "data.wings=1"], "data.wings"),
        (["data=test", "output=a.txt"], "output=a.txt"),
        (["data=synthetic", "data.image_size=16"], "data.image_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_for_test_images(predict, tmp_path, arguments, message):
    picture(tmp_path / "a.png")
    status, printed, error = predict(*arguments)
    assert (status, printed, error.count("\n")) == (1, "", 1)
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "There are no images to predict"),
        (["a.png", "conformal=0"], 1, "conformal=0 is out of range: it must be above 0 and below 1"),
        (["a.png", "conformal=few"], 1, "conformal=few"),
        (["a.png", "conformal=0.1"], 1, "conformal=0.1: no threshold was fitted"),
        (["a.png", "ttta=mirror"], 1, "Did you mean tta?"),
        (["a.png", "+ttta=mirror"], 1, "ttta: unknown setting. Did you mean tta?"),
        (["a.png", "++images=3"], 1, "images: unknown setting."),  # a setting of another command
        (["a.png", "~top"], 1, "top cannot be removed. Set it to a value: top=…"),
        (["a.png", "tta=rotate"], 1, "tta=rotate"),
        (["a.png", "top=0"], 1, "top=0 is out of range: it must be at least 1"),
        (["a.png", "top=many"], 1, "top=many is not valid"),
        (["a.png", "workers=0"], 1, "workers=0"),
        (["a.png", "batch_size=0"], 1, "batch_size=0"),
        (["a.png", "temperature=0"], 1, "temperature=0"),
        (["a.png", "temperature=hot"], 1, "temperature=hot"),
        (["a.png", "precision=bf8"], 1, "precision=bf8"),
        (["a.png", "output=a.png"], 1, "output=a.png: use a file name that ends with .csv or .json"),
        (["a.png", "output=a.png/b.csv"], 1, "output=a.png/b.csv cannot be written"),
        (["a.png", "output=pipe.csv"], 1, "pipe.csv cannot be written: it is not a regular file"),
        (["a.png", "--batch-size=3"], 2, "Write settings without dashes: batch_size=3"),
        (["a.png", "--top", "3"], 2, "Write settings without dashes: top=…"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(predict, tmp_path, arguments, status, message):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.csv")
    exit_status, printed, error = predict(*arguments)
    assert (exit_status, printed) == (status, "")
    assert message in error
    assert error.count("\n") == status  # argparse prints the usage as well


def test_libraries_print_nothing(run, tmp_path, monkeypatch):
    """Lightning would print the precision, and that `srun` is not used."""
    picture(tmp_path / "a.png")
    tmp_path.joinpath("srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = [sys.executable, "-m", "cifarnet.predict", run, tmp_path / "a.png", "accelerator=cpu"]
    result = subprocess.run([*program, "precision=bf16-mixed"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(str(tmp_path / "a.png"))
    code = f"import cifarnet; cifarnet.load({str(run)!r}).predict({str(tmp_path / 'a.png')!r}, precision='bf16-mixed')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_files_that_are_left_out_are_reported_in_one_line(predict, tmp_path):
    for name in ("a.heic", "below/b", "c.jpg_large", "Thumbs.db", ".DS_Store", "desktop.ini", "notes.txt"):
        (tmp_path / "all" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "all" / name).touch()
    picture(tmp_path / "all/d.png")
    status, printed, error = predict("all")
    assert (status, len(printed.splitlines())) == (0, 1)
    assert error == "all: 3 files left out: 1 .heic, 1 .jpg_large, 1 without an ending.\n"


def test_empty_folders(predict, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    status, printed, error = predict("empty", "a.png")
    assert (status, error.count("\n"), "There are no images" in error, "in empty." in error) == (0, 1, True, True)
    assert len(printed.splitlines()) == 1
    status, printed, error = predict("empty")
    assert (status, printed) == (1, "")
    assert error.splitlines()[-1].startswith("Error: There are no images to predict.")


def test_folder_that_cannot_be_read(predict, classifier, tmp_path, monkeypatch):
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
    assert "The folder all/locked cannot be read." in error
    assert "1 of 2 pictures could not be read" in error
    with pytest.raises(UserError, match="locked cannot be read"):
        classifier.predict("all")


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "LARGE", 100)
    original, lock, active, most = pixels.fitted, threading.Lock(), set(), {}

    def watch(image, size):
        with lock:
            active.add(threading.get_ident())
            most[image.width] = max(most.get(image.width, 0), len(active))
        threading.Event().wait(0.02)
        with lock:
            active.discard(threading.get_ident())
        return original(image, size)

    monkeypatch.setattr(pixels, "fitted", watch)
    for side, expected in [(11, 1), (10, 2)]:
        for i in range(16):
            picture(tmp_path / f"{side}/{i:02}.png", size=(side, side))
        files = sorted(map(str, (tmp_path / str(side)).iterdir()))
        assert [source for source, _ in decoding.decode_all(files, 8, 16, 4)] == files
        assert (most[side] == 1) == (expected == 1), most


def test_decoding_does_not_run_far_ahead(monkeypatch):
    started = []
    monkeypatch.setattr(pixels, "fitted", lambda image, size: started.append(1) or Image.new("RGB", (size, size)))
    images = [np.zeros((4, 4), np.uint8)] * 4000
    decoded = decoding.decode_all(images, 4, 50, 2)
    next(decoded)
    threading.Event().wait(0.3)
    assert len(started) <= 2 * 50 + 16 * 3
    assert len(list(decoded)) == 3999


class Bomb:
    """An object whose unpickling creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda checkpoint: checkpoint.update(extra=Bomb()), "is not a readable cifarnet checkpoint"),
        (
            lambda checkpoint: checkpoint["hyper_parameters"].update(
                model={"_target_": "os.mkdir", "path": "exploded"}
            ),
            "the class os.mkdir, which is not part of cifarnet.models",
        ),
        (lambda checkpoint: checkpoint["hyper_parameters"].update(image_size=10**6), "image_size=1000000"),
        (lambda checkpoint: checkpoint["hyper_parameters"].update(precision="x"), "precision=x"),
        (lambda checkpoint: checkpoint["state_dict"]["network.normalize.mean"].fill_(torch.nan), "not finite"),
    ],
    ids=["pickle", "class", "size", "precision", "nan"],
)
def test_altered_checkpoints_run_no_code(command, changed, tmp_path, alter, message):
    picture(tmp_path / "a.png")
    status, printed, error = command(str(changed(alter)), "a.png", "accelerator=cpu", main=main)
    assert (status, printed) == (1, "")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["a.png", "changed.ckpt"]


def test_control_characters_in_class_names_are_escaped(command, changed, tmp_path):
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


def test_grad_cam_maps(predict, run, tmp_path):
    for path in (tmp_path / "a/cat.png", tmp_path / "b/cat.jpg", tmp_path / "b" / f"{'ä' * 120}.png"):
        picture(path)
    (tmp_path / "b/empty.png").touch()
    status, out, err = predict(tmp_path / "a", tmp_path / "b", "explain=true")
    assert status == 1
    assert "empty.png cannot be read" in err
    folder = Path(out.rpartition("Grad-CAM maps: ")[2].strip())
    assert sorted(path.name for path in folder.iterdir()) == ["cat.png", "cat_2.png", f"{'ä' * 75}.png"]
    assert folder.resolve().parent == (run / "explained").resolve()
    assert Image.open(folder / "cat.png").width == 1080
