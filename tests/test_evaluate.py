import base64
import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

import cifarnet
from cifarnet import cli
from cifarnet.checkpoint import Checkpoint
from cifarnet.config import CONFIGS
from cifarnet.data import Synthetic
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate, main
from cifarnet.inference import test_images
from cifarnet.records.evaluation import Evaluation
from cifarnet.train import train

# 60 steps, enough to learn some of the shapes
LEARNS = [
    *("data=synthetic", "data.train_size=1500", "data.test_size=300", "data.batch_size=50", "trainer.max_epochs=2"),
    *("model=speednet", "model.widths=[8,16,16]", "optimizer=muon", "optimizer.lr=0.1", "scheduler=linear"),
    *("trainer=cpu", "threads=1"),
]
QUICK = ["corruptions=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    train(cli.compose("train", [*LEARNS, "trainer.precision=32-true", f"output_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def evaluated(run):
    """Its evaluation, with corruptions."""
    return evaluate(run)


@pytest.fixture
def command(command):
    """Run `python -m cifarnet.evaluate …` in this process, and return its exit status, stdout and stderr."""
    return lambda *arguments: command(*map(str, arguments), main=main)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tta", ["none", "mirror_translate"])
def test_results_equal_those_of_training(config, tmp_path, precision, tta):
    settings = [*LEARNS, f"trainer.precision={precision}", f"module.tta={tta}", "module.tta_share=0.3"]
    train(config(*settings, "data.eval_batch_size=70", without=""))
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    measured = evaluate(tmp_path / "run", QUICK)
    assert measured["test"]["accuracy"] == trained["test_accuracy"] > 0.2  # chance is 0.1
    assert measured["test_accuracy_one_view"] == trained["test_accuracy_one_view"]
    assert measured["val"]["accuracy"] == trained["val_accuracy"]
    assert measured["test"]["cross_entropy"] == pytest.approx(trained["test_cross_entropy"], rel=1e-5)
    assert measured["data"] == trained["data"]
    other = evaluate(tmp_path / "run", [*QUICK, "data.eval_batch_size=33"])["test"]
    assert other["accuracy"] == measured["test"]["accuracy"]
    assert (measured["precision"], measured["tta"], measured["tta_share"]) == (precision, tta, 0.3)


def test_files(run, evaluated):
    folder = run / "evaluation"
    pictures = ["accuracy", "confusion", "corruption_examples", "corruptions", "mistakes", "reliability", "selective"]
    pictures += [f"confused_{rank}" for rank in range(1, 6)]
    files = sorted([*(f"{name}.png" for name in pictures), "metrics.json", "predictions.csv", "report.html"])
    assert sorted(path.name for path in folder.iterdir()) == files
    record = json.loads((folder / "metrics.json").read_text())
    assert record["test"] == evaluated["test"]
    for key in ("versions", "hardware", "git_commit", "command", "config", "finished", "data"):
        assert key in record

    html = (folder / "report.html").read_text()
    name = json.loads((run / "metrics.json").read_text())["name"]
    assert f"<h1>Evaluation of {name}</h1>" in html
    assert f'<p class="result">{evaluated["test"]["accuracy"]:.1%}</p>' in html  # of 300 images
    assert "${" not in html
    inlined = [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)', html)]
    assert sorted(inlined) == sorted((folder / f"{name}.png").read_bytes() for name in pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in inlined)


def test_results_agree_with_each_other(evaluated):
    test, confusion = evaluated["test"], torch.tensor(evaluated["confusion"])
    assert confusion.sum() == test["images"] == 300
    assert confusion.diagonal().sum() / 300 == pytest.approx(test["accuracy"])
    assert test["interval"][0] < test["accuracy"] < test["interval"][1]
    assert test["accuracy"] < test["top2_accuracy"] <= 1
    assert [row["accuracy"] for row in evaluated["classes"]] == pytest.approx(
        (confusion.diagonal() / confusion.sum(1)).tolist()
    )
    confidences = [mistake["confidence"] for mistake in evaluated["mistakes"]]
    assert len(confidences) == 20
    assert confidences == sorted(confidences, reverse=True)


def test_predictions_of_each_image(run, evaluated):
    with (run / "evaluation/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["image"]) for row in rows] == list(range(300))
    assert sum(row["correct"] == "True" for row in rows) / 300 == pytest.approx(evaluated["test"]["accuracy"])
    mean_loss = sum(float(row["loss"]) for row in rows) / 300
    assert mean_loss == pytest.approx(evaluated["test"]["cross_entropy"])
    confusion = Counter((row["class"], row["predicted"]) for row in rows)
    for label, counts in zip(evaluated["class_names"], evaluated["confusion"], strict=True):
        assert [confusion[label, guess] for guess in evaluated["class_names"]] == counts
    first = evaluated["mistakes"][0]
    row = rows[first["index"]]
    assert (row["class"], row["predicted"]) == (first["class"], first["predicted"])
    assert float(row["probability"]) == pytest.approx(first["confidence"])


def test_selective_and_conformal_prediction(run, evaluated):
    record = Evaluation.read(run / "evaluation/metrics.json")
    assert record.selective == evaluated["selective"]
    assert record.conformal == evaluated["conformal"]
    assert record.selective["coverages"][-1]["accuracy"] == pytest.approx(record.test["accuracy"])
    assert 0 < record.selective["aurc"] < 1 - record.test["accuracy"]
    found = record.conformal["sets"]["LAC"]
    assert (record.conformal["alpha"], record.conformal["val_images"]) == (0.1, record.val["images"])
    assert found["interval"][0] < 0.95
    assert found["interval"][1] > 0.85
    assert record.macro_f1 == pytest.approx(sum(row["f1"] for row in record.classes) / 10)


def test_mistakes_are_mistakes(run, evaluated):
    network, names = cifarnet.load(run)
    source = Synthetic(train_size=1500, test_size=300).source.test
    for mistake in evaluated["mistakes"]:
        with torch.no_grad():
            probabilities = network(source.images[mistake["index"]][None]).softmax(1)[0]
        assert names[source.labels[mistake["index"]]] == mistake["class"] != mistake["predicted"]
        assert names[probabilities.argmax()] == mistake["predicted"]
        assert probabilities.max().item() == pytest.approx(mistake["confidence"], abs=1e-4)


def test_corruptions_cost_accuracy(evaluated):
    corruptions, clean = evaluated["corruptions"], evaluated["test"]["accuracy"]
    assert all(len(row) == 5 for row in corruptions["accuracy"].values())
    assert corruptions["accuracy"].keys() == corruptions["levels"].keys()
    mean = sum(map(sum, corruptions["accuracy"].values())) / (5 * len(corruptions["accuracy"]))
    assert corruptions["mean"] == pytest.approx(mean)
    assert mean < clean
    assert corruptions["accuracy"]["noise"][-1] < clean


def test_command_prints_its_results(run, command):
    status, printed, _ = command(run, *QUICK, "tta=mirror")
    assert status == 0
    record = json.loads((run / "evaluation/metrics.json").read_text())
    for figure in (record["test"]["accuracy"], *record["test"]["interval"], record["test_accuracy_one_view"]):
        assert f"{figure:.1%}" in printed  # 300 images
    assert f"temperature {record['temperature']:.3f}" in printed
    assert "report.html" in printed
    assert record["tta"] == "mirror"
    assert record["command"].endswith("corruptions=false tta=mirror")


def test_paths_with_special_characters(run, command, tmp_path):
    folder = tmp_path / "ckpt_path=a, (b)=[c] 'd'"
    shutil.copytree(run, folder)
    status, _, error = command(folder, *QUICK)
    assert status == 0, error
    assert (folder / "evaluation/report.html").exists()
    lone = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lone=1.ckpt")
    status, _, error = command(lone, *QUICK)
    assert status == 0, error
    assert (tmp_path / "lone=1_evaluation/report.html").exists()


def test_run_without_validation_images_has_no_temperature(config, tmp_path):
    train(config("data.val_fraction=0"))
    measured = evaluate(tmp_path / "run", QUICK)
    assert measured["val"] is measured["temperature"] is measured["test_with_temperature"] is None
    assert measured["conformal"] is None
    assert "Not measured: the run trained on all images" in (tmp_path / "run/evaluation/report.html").read_text()


def test_other_data_is_split_like_the_runs_data(config, tmp_path):
    train(config("data.val_fraction=0.2", "data.split_seed=3", "data.eval_batch_size=30"))
    measured = evaluate(tmp_path / "run", [*QUICK, "data=synthetic", "data.train_size=300", "data.seed=1"])
    assert (measured["data"]["train"], measured["data"]["val"], measured["data"]["test"]) == (240, 60, 50)
    data = measured["config"]["data"]
    assert (data["val_fraction"], data["split_seed"], data["eval_batch_size"]) == (0.2, 3, 30)
    measured = evaluate(tmp_path / "run", [*QUICK, "data=synthetic", "data.val_fraction=0.5", "data.train_size=100"])
    assert measured["data"]["val"] == measured["data"]["train"] == 50  # less than a training batch
    same = evaluate(tmp_path / "run", [*QUICK, "data.test_size=20"])
    assert (same["data"]["train"], same["data"]["test"]) == (160, 20)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["data=folder", "data.root=x"], {"folds": None, "fold": None, "coarse": None, "image_size": 32}),
        (["data=cifar100"], {"folds": 5, "fold": 1, "coarse": True, "read_only": None}),
        (["data=cifar100", "data.coarse=false", "data.fold=2"], {"folds": 5, "fold": 2, "coarse": False}),
        (["data.root=x"], {"folds": 5, "fold": 1, "coarse": True, "read_only": True}),
        (["data.root=x", "data.folds=null", "data.fold=null"], {"folds": None, "fold": None}),
    ],
)
def test_the_settings_of_the_run_that_apply_to_the_test(changed, chosen, expected):
    training = {"images_per_class": 400, "imbalance": 10, "label_noise": 0.2, "train_share": 0.5}
    recorded = {"_target_": "cifarnet.data.CIFAR100", "coarse": True, "folds": 5, "fold": 1, "read_only": False}
    path = changed(to(data=recorded | training | {"val_fraction": 0.2, "split_seed": 3}))
    data = test_images.compose("evaluate", chosen, Checkpoint.open(path), []).data
    expected = expected | dict.fromkeys(training) | {"val_fraction": 0.2, "split_seed": 3}
    assert {key: data.get(key) for key in expected} == expected


def test_the_data_of_a_run_on_a_part_of_the_training_images(config, tmp_path):
    (tmp_path / "keep.txt").write_text("\n".join(map(str, range(100))))
    settings = ["data.label_noise=0.5", "data.noise_type=pairs", f"data.keep={tmp_path}/keep.txt"]
    train(config(*settings, "data.batch_size=16"))
    trained = json.loads((tmp_path / "run/metrics.json").read_text())["data"]
    measured = evaluate(tmp_path / "run", QUICK)["data"]
    assert trained["train"] < measured["train"]
    assert {key: measured[key] for key in measured if key != "train"}.items() <= trained.items()
    assert "20 validation and 50 test images; sha256 " in (tmp_path / "run/evaluation/report.html").read_text()


def test_other_data_has_the_runs_fold(config, tmp_path):
    train(config("data.folds=4", "data.fold=3", "data.label_noise=0.5"))
    for overrides in (["data=synthetic", "data.train_size=200"], []):  # the temperature needs images not trained on
        measured = evaluate(tmp_path / "run", [*QUICK, *overrides])
        assert (measured["config"]["data"]["folds"], measured["config"]["data"]["fold"]) == (4, 3)
        assert (measured["data"]["train"], measured["data"]["val"]) == (150, 50)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ttta=mirror"], "Did you mean tta?"),
        (["data.rot=x"], "data.rot=x"),
        (["data=cifra10"], "Did you mean cifar10?"),
        (["tta=rotate"], "tta=rotate"),
        (["tta_share=2"], "tta_share=2"),
        (["tta_share=x"], "tta_share=x is not valid"),
        (["corruptions=some"], "corruptions=some is not valid"),
        (["precision=bf8"], "precision=bf8"),
        (["accelerator=abacus"], "accelerator=abacus"),
        (["data.test_size=many"], "data.test_size=many is not valid"),
        (["data=folder"], "data.root is required"),
        (["~data"], "data"),
        (["cifar10_c=nowhere"], "cifar10_c=nowhere requires CIFAR-10's classes"),
        (["cifar10h=nowhere"], "the data is Synthetic"),
        (["classes=[no.such]"], "no.such"),
        (["classes=3"], "classes=3 is not valid"),
        (["classes=no.such"], "classes=no.such is not valid"),
        (["tta_share=nan"], "tta_share=nan"),
        (["alpha=0"], "alpha=0 is out of range: it must be above 0 and below 1"),
        (["alpha=1"], "alpha=1"),
        (["seed=-1"], "seed=-1 is out of range: it must be at least 0 and at most 4,294,967,295"),
        (["seed=4294967296"], "seed=4294967296"),
        (["data.eval_batch_size=0"], "data.eval_batch_size=0"),
        (["data.val_fraction=nan"], "data.val_fraction=nan"),
        (["output_dir=/dev/null/x"], "output_dir=/dev/null/x cannot be created"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings(run, command, overrides, message):
    status, _, error = command(run, *QUICK, *overrides)
    assert status == 1
    assert message in error
    assert error.count("\n") == 1


def test_replacing_an_evaluation_is_reported(run, command, tmp_path):
    for expected in (False, True):
        status, printed, error = command(run, *QUICK, f"output_dir={tmp_path / 'mine'}")
        assert status == 0, error
        assert (f"Replaces the evaluation in {tmp_path / 'mine'}. To keep it, set output_dir=" in printed) is expected


def test_the_record_of_a_run_is_not_replaced(run, tmp_path):
    before = (run / "metrics.json").read_bytes()
    with pytest.raises(
        UserError, match=rf"^output_dir={run} is the folder of a run\. Choose another folder to keep its record"
    ):
        evaluate(run, [*QUICK, f"output_dir={run}"])
    assert (run / "metrics.json").read_bytes() == before


def test_a_path_is_required(command):
    assert command(*QUICK)[0] != 0


def test_data_for_another_task(run, changed, command):
    path = changed(to(class_names=list("abcdefghij")))
    status, _, error = command(path)
    assert status == 1
    assert "The data has the classes disc, ring" in error
    assert f"{path} was trained on a, b, c" in error

    path = changed(to(image_size=33))  # pooled to the same size as 32
    status, _, error = command(path)
    assert status == 1
    assert f"The images are 32 pixels wide; {path} was trained on images of 33" in error


class Bomb:
    """An object whose unpickling creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def to(section=None, **values):
    """Alter a checkpoint's hyperparameters, or a section of them."""
    return lambda checkpoint: (
        checkpoint["hyper_parameters"][section] if section else checkpoint["hyper_parameters"]
    ).update(values)


MKDIR = {"_target_": "os.mkdir", "path": "exploded"}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda checkpoint: checkpoint.update(extra=Bomb()), "is not a readable cifarnet checkpoint"),
        (to(model=MKDIR), "names the class os.mkdir, which is not part of cifarnet.models"),
        (to(data=MKDIR), "names the class os.mkdir, which is not part of cifarnet.data"),
        (to("data", _target_="torch.hub.load"), "the class torch.hub.load"),
        (to("data", _target_="cifarnet.data.folder.os.mkdir"), "the class cifarnet.data.folder.os.mkdir"),
        (to("data", _target_=["os.mkdir"]), "the class ['os.mkdir']"),
        (to("data", val_fraction=float("nan")), "data.val_fraction=nan"),
        (to("data", test_size=-1), "data.test_size=-1"),
        (to("data", wings=1), "data.wings=1"),
        (to("model", widths=[8, 8, 8]), "do not fit the network"),
        (to("model", wings=2), "model.wings=2"),
        (to("model", widths=MKDIR), "model.widths="),
        (to(cifarnet="999.1"), "was written by cifarnet 999.1"),
        (to(class_names=None), "is not a readable cifarnet checkpoint"),
        (to(image_size="x"), "image_size=x"),
        (lambda checkpoint: checkpoint["hyper_parameters"].pop("model"), "is not a readable cifarnet checkpoint"),
        (to(precision="x"), "precision=x"),
        (to(tta="x"), "tta=x"),
    ],
)
def test_altered_checkpoints_run_no_code(changed, command, tmp_path, monkeypatch, alter, message):
    monkeypatch.chdir(tmp_path)
    path = changed(alter)
    status, _, error = command(path)
    assert status == 1
    assert message in error
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("other_data", [(), ("data=synthetic", "data.train_size=200", "data.test_size=20")])
def test_only_numbers_of_the_data_are_used(changed, command, tmp_path, monkeypatch, other_data):
    monkeypatch.chdir(tmp_path)
    extra = {"seed={_target_: os.mkdir, path: exploded}, x": 1, "seed._target_": 1, "_args_": 1, "_partial_": True}
    values = {"transforms": {"a": MKDIR}, "split_seed": MKDIR, "flip": "${oc.env:HOME}", "train_sizes": [MKDIR]}
    path = changed(to("data", **values, **extra))
    status, _, error = command(path, *QUICK, *other_data)
    assert status == 0, error
    config = json.loads((tmp_path / "changed_evaluation/metrics.json").read_text())["config"]
    assert "os.mkdir" not in json.dumps(config)
    assert not extra.keys() & config["data"].keys()
    assert not (tmp_path / "exploded").exists()


def test_damaged_files(run, command, tmp_path):
    content = (run / "checkpoints/best.ckpt").read_bytes()
    for name, damaged in [("truncated", content[: len(content) // 2]), ("empty", b""), ("other", b"no checkpoint")]:
        (tmp_path / name).write_bytes(damaged)
        status, _, error = command(tmp_path / name)
        assert status == 1
        assert f"{tmp_path / name} is not a readable cifarnet checkpoint" in error
        assert "Traceback" not in error
    status, _, error = command(tmp_path)
    assert status == 1
    assert f"{tmp_path}/checkpoints/best.ckpt: no checkpoint found" in error


class OwnData(Synthetic):
    pass


def test_own_classes_have_to_be_allowed(config, tmp_path):
    overrides = ["~model", "+model={_target_: conftest.CustomNetwork}", f"data._target_={__name__}.OwnData"]
    train(config(*overrides, without="model"))
    network, data = "conftest.CustomNetwork", f"{__name__}.OwnData"
    with pytest.raises(UserError, match=rf"{network}, which is not part of cifarnet.models.*classes=\[module"):
        evaluate(tmp_path / "run", [*QUICK, f"classes=[{data}]"])
    with pytest.raises(UserError, match=rf"{data}, which is not part of cifarnet.data"):
        evaluate(tmp_path / "run", [*QUICK, f"classes=[{network}]"])
    measured = evaluate(tmp_path / "run", [*QUICK, f"classes=[{network},{data}]"])
    assert measured["network"] == "CustomNetwork"
    assert measured["data"]["source"] == "OwnData"
    other = evaluate(tmp_path / "run", [*QUICK, f"classes=[{network}]", "data=synthetic", f"data._target_={data}"])
    assert other["data"]["source"] == "OwnData"  # the command names it


def test_learning_curve_and_settings_come_from_the_run(run, evaluated, tmp_path):
    assert evaluated["training_settings"]["optimizer.lr"] == "0.1"
    assert not {"output_dir", "logger.tensorboard._target_"} & evaluated["training_settings"].keys()
    file = shutil.copy(run / "checkpoints/best.ckpt", tmp_path)
    assert evaluate(file, QUICK)["training_settings"] == {}
    assert not (tmp_path / "best_evaluation/accuracy.png").exists()
    assert (tmp_path / "best_evaluation/confusion.png").exists()


def test_precision_is_that_of_training(changed):
    assert evaluate(changed(to(precision="bf16-mixed")), QUICK)["precision"] == "bf16-mixed"
    assert evaluate(changed(to(precision="bf16-mixed")), [*QUICK, "precision=32-true"])["precision"] == "32-true"


def test_diverged_network(changed):
    def alter(checkpoint):
        checkpoint["state_dict"]["network.normalize.mean"][0] = float("nan")

    with pytest.raises(UserError, match="training diverged"):
        evaluate(changed(alter), QUICK)


def test_full_disk_keeps_the_previous_evaluation(run, evaluated, command, monkeypatch, tmp_path):
    before = {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    status, _, error = command(run, *QUICK)
    assert status == 1
    assert re.fullmatch(r"Error: \S+ cannot be written: No space left on device\..*\n", error)
    assert {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()} == before


def test_help_is_quick_and_complete():
    program = "import sys; from cifarnet.evaluate import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 3  # a second on an idle machine
    for line in (CONFIGS / "evaluate.yaml").read_text().splitlines()[1:]:
        assert line in result.stdout
    assert "python -m cifarnet.evaluate lightning_logs" in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_the_processor(run, evaluated):
    measured = evaluate(run, [*QUICK, "accelerator=gpu"])
    assert measured["hardware"]["device"] == "cuda"
    assert measured["test"]["accuracy"] == pytest.approx(evaluated["test"]["accuracy"], abs=0.01)


def test_run_on_photographs(config, few_photographs, tmp_path):
    """The folder of the pictures is never read from a checkpoint; the other settings are."""
    train(config("data=folder", f"data.root={few_photographs}", "data.batch_size=32", without="data"))
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    with pytest.raises(UserError, match=r"does not contain the path of its images.*Add data\.root="):
        evaluate(tmp_path / "run", QUICK)
    measured = evaluate(tmp_path / "run", [*QUICK, f"data.root={few_photographs}"])
    assert measured["test"]["accuracy"] == trained["test_accuracy"]
    assert measured["data"] == trained["data"]
    content = (tmp_path / "run/evaluation/predictions.csv").read_text()
    for row in csv.DictReader(content.splitlines()):
        assert row["image"].startswith(f"test/{row['class']}/")
        assert (few_photographs / row["image"]).is_file()
    streamed = evaluate(tmp_path / "run", [*QUICK, f"data.root={few_photographs}", "data.in_memory=false"])
    assert streamed["mistakes"] == measured["mistakes"]
    assert (tmp_path / "run/evaluation/predictions.csv").read_text() == content
    assert (tmp_path / "run/evaluation/confused_1.png").exists()


def test_links_out_of_the_run_are_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    (tmp_path / "mine").mkdir()
    (copy / "evaluation").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="evaluation is a link to a place outside"):
        evaluate(copy, QUICK)
    assert not list((tmp_path / "mine").iterdir())
    assert evaluate(copy, [*QUICK, f"output_dir={copy / 'evaluation'}"])
