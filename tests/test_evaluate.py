import base64
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import cifarnet
from cifarnet import cli
from cifarnet.config import CONFIGS
from cifarnet.data import Synthetic
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate, main, make_folder
from cifarnet.evaluation import report
from cifarnet.inference.test_images import plain
from cifarnet.train import train

# enough to tell some of the shapes: 60 steps
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
    """Its evaluation, with everything."""
    return evaluate(run, ["output_dir=null"])


@pytest.fixture
def command(command):
    """Run `python -m cifarnet.evaluate …` in this process: exit status, what was printed, and to stderr."""
    return lambda *arguments: command(*map(str, arguments), main=main)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tta", ["none", "mirror_translate"])
def test_results_are_those_of_training(config, tmp_path, precision, tta):
    settings = [*LEARNS, f"trainer.precision={precision}", f"module.tta={tta}", "module.tta_share=0.3"]
    train(config(*settings, "data.eval_batch_size=70", without=""))
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    measured = evaluate(tmp_path / "run", QUICK)
    assert measured["test"]["accuracy"] == trained["test_accuracy"] > 0.2  # 0.1 would be chance
    assert measured["test_accuracy_one_view"] == trained["test_accuracy_one_view"]
    assert measured["val"]["accuracy"] == trained["val_accuracy"]
    assert measured["test"]["cross_entropy"] == pytest.approx(trained["test_cross_entropy"], rel=1e-5)
    assert measured["data"] == trained["data"]
    other = evaluate(tmp_path / "run", [*QUICK, "data.eval_batch_size=33"])["test"]
    assert other["accuracy"] == measured["test"]["accuracy"]
    assert (measured["precision"], measured["tta"], measured["tta_share"]) == (precision, tta, 0.3)


def test_folder_holds_what_it_should(run, evaluated, command):
    folder = run / "evaluation"
    pictures = ["accuracy", "confusion", "corruption_examples", "corruptions", "mistakes", "reliability"]
    files = sorted([*(f"{name}.png" for name in pictures), "metrics.json", "report.html"])
    assert sorted(path.name for path in folder.iterdir()) == files
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept["test"] == evaluated["test"]
    for key in ("versions", "hardware", "git_commit", "command", "config", "finished", "data"):
        assert key in kept

    html = (folder / "report.html").read_text()
    assert f"<h1>{evaluated['test']['accuracy']:.2%}</h1>" in html
    inlined = [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)', html)]
    assert sorted(inlined) == sorted((folder / f"{name}.png").read_bytes() for name in pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in inlined)
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)  # it opens offline


def test_results_agree_with_each_other(evaluated):
    test, confusion = evaluated["test"], torch.tensor(evaluated["confusion"])
    assert confusion.sum() == test["images"] == 300
    assert confusion.diagonal().sum() / 300 == pytest.approx(test["accuracy"])
    assert test["interval"][0] < test["accuracy"] < test["interval"][1]
    assert test["accuracy"] < test["top2_accuracy"] <= 1
    assert [row["accuracy"] for row in evaluated["classes"]] == pytest.approx(
        (confusion.diagonal() / confusion.sum(1)).tolist()
    )
    sureness = [mistake["confidence"] for mistake in evaluated["mistakes"]]
    assert len(sureness) == 20
    assert sureness == sorted(sureness, reverse=True)


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


def test_command_prints_what_it_found(run, command):
    status, printed, _ = command(run, *QUICK, "tta=mirror")
    assert status == 0
    kept = json.loads((run / "evaluation/metrics.json").read_text())
    for figure in (kept["test"]["accuracy"], *kept["test"]["interval"], kept["test_accuracy_one_view"]):
        assert f"{figure:.2%}" in printed
    assert f"temperature {kept['temperature']:.3f}" in printed
    assert "report.html" in printed
    assert kept["tta"] == "mirror"
    assert kept["command"].endswith("corruptions=false tta=mirror")


def test_a_path_is_taken_literally(run, command, tmp_path):
    folder = tmp_path / "ckpt_path=a, (b)=[c] 'd'"
    shutil.copytree(run, folder)
    status, _, error = command(folder, *QUICK)
    assert status == 0, error
    assert (folder / "evaluation/report.html").exists()
    lone = shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lone=1.ckpt")
    status, _, error = command(lone, *QUICK)
    assert status == 0, error
    assert (tmp_path / "lone=1_evaluation/report.html").exists()


def test_training_on_all_images_leaves_no_temperature(config, tmp_path):
    train(config("data.val_fraction=0"))
    measured = evaluate(tmp_path / "run", QUICK)
    assert measured["val"] is measured["temperature"] is measured["test_with_temperature"] is None
    assert "none are left to fit a temperature on" in (tmp_path / "run/evaluation/report.html").read_text()


def test_other_data_is_split_as_the_runs_was(config, tmp_path):
    train(config("data.val_fraction=0.2", "data.split_seed=3", "data.eval_batch_size=30"))
    measured = evaluate(tmp_path / "run", [*QUICK, "data=synthetic", "data.train_size=300", "data.seed=1"])
    assert (measured["data"]["train"], measured["data"]["val"], measured["data"]["test"]) == (240, 60, 2000)
    data = measured["config"]["data"]
    assert (data["val_fraction"], data["split_seed"], data["eval_batch_size"]) == (0.2, 3, 30)
    measured = evaluate(tmp_path / "run", [*QUICK, "data=synthetic", "data.val_fraction=0.5", "data.train_size=100"])
    assert measured["data"]["val"] == measured["data"]["train"] == 50  # fewer than a batch of training has
    same = evaluate(tmp_path / "run", [*QUICK, "data.test_size=20"])  # the run's own, but for this
    assert (same["data"]["train"], same["data"]["test"]) == (160, 20)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["ttta=mirror"], "Did you mean tta?"),
        (["data.rot=x"], "data.rot is no setting"),
        (["data=cifra10"], "Did you mean cifar10?"),
        (["tta=rotate"], "tta=rotate: choose one of none, mirror"),
        (["tta_share=2"], "tta_share=2"),
        (["tta_share=x"], "tta_share=x has the wrong type: expected a number"),
        (["corruptions=some"], "corruptions=some has the wrong type: expected true or false"),
        (["precision=bf8"], "precision=bf8"),
        (["accelerator=abacus"], "accelerator=abacus"),
        (["data.test_size=many"], "data.test_size=many has the wrong type: expected a whole number"),
        (["data=folder"], "data.root is needed"),
        (["~data"], "data names nothing to build"),
        (["cifar10_c=nowhere"], "its labels are CIFAR-10's"),
        (["cifar10h=nowhere"], "which Synthetic does not have"),
        (["classes=[no.such]"], "there is no class no.such"),
        (["classes=3"], "classes=3 has the wrong type: expected a list"),
        (["classes=no.such"], "classes=no.such has the wrong type: expected a list"),
        (["tta_share=nan"], "tta_share=nan: give a number from 0 to 1"),
        (["seed=-1"], "seed=-1: give a number from 0 to 4,294,967,295"),
        (["seed=4294967296"], "seed=4294967296: give a number from 0 to 4,294,967,295"),
        (["data.eval_batch_size=0"], "data.eval_batch_size=0: give a number from 1 to 1,000,000"),
        (["data.val_fraction=nan"], "data.val_fraction=nan: give a number that is finite"),
        (["output_dir=/dev/null/x"], "output_dir=/dev/null/x cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_told_in_one_message(run, command, overrides, named):
    status, _, error = command(run, *QUICK, *overrides)
    assert status == 1
    assert named in error
    assert "Traceback" not in error


def test_one_checkpoint_at_a_time(run, command):
    status, _, error = command(run, run, *QUICK)
    assert status == 1
    assert "2 paths are given" in error
    assert command(*QUICK)[0] != 0


def test_data_for_another_task_is_refused(run, changed, command):
    status, _, error = command(changed(to_all(class_names=list("abcdefghij"))))
    assert status == 1
    assert "The data has the classes disc, ring" in error
    assert "the network knows a, b, c" in error

    status, _, error = command(changed(to_all(image_size=33)))  # pooled to the same size as 32
    assert status == 1
    assert "The images are 32 pixels wide; the network was trained on 33" in error


class Bomb:
    """What a stranger would have pickle run."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def to(section, **values):
    """Alter a section of the checkpoint's config."""
    return lambda checkpoint: checkpoint["hyper_parameters"]["config"][section].update(values)


def to_all(**values):
    """Alter what the checkpoint keeps beside the weights."""
    return lambda checkpoint: checkpoint["hyper_parameters"].update(values)


def sections(**values):
    """Put others in place of whole sections of the checkpoint's config."""
    return lambda checkpoint: checkpoint["hyper_parameters"]["config"].update(values)


MKDIR = {"_target_": "os.mkdir", "path": "exploded"}
QUOTED = "', _target_: os.mkdir, path: exploded, x: '"


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (lambda checkpoint: checkpoint.update(extra=Bomb()), "not a checkpoint of cifarnet"),
        (sections(model=MKDIR), "the class os.mkdir, which is no class that this project lists"),
        (sections(data=MKDIR), "the class os.mkdir"),
        (to("data", _target_="torch.hub.load"), "the class torch.hub.load"),
        (to("data", _target_="cifarnet.data.folder.os.mkdir"), "the class cifarnet.data.folder.os.mkdir"),
        (to("data", _target_=["os.mkdir"]), "the class ['os.mkdir']"),
        (to("data", seed=MKDIR), "data.seed={'_target_': 'os.mkdir'"),
        (to("data", train_sizes=[MKDIR]), "data.train_sizes=[{"),
        (to("data", _args_=[1]), "data._args_"),
        (to("data", defaults=["/optimizer: sgd"]), "data.defaults"),
        (to("data", split_seed="${oc.env:HOME}"), "data.split_seed=${oc.env:HOME}"),
        (to("data", **{"seed._target_": "os.mkdir"}), "data.seed._target_=os.mkdir"),
        (to("data", **{"seed={_target_: os.mkdir, path: exploded}, x": 1}), "data.seed={_target_: os.mkdir"),
        (to("data", flip=QUOTED), QUOTED),
        (to("data", train_sizes=[f"[{QUOTED}]"]), QUOTED),
        (to("model", widths=[8, 8, 8]), "its network has changed"),
        (to("model", wings=2), "its network has changed"),
        (to("model", widths=MKDIR), "its network has changed"),
        (to_all(cifarnet="999.1"), "cifarnet 999.1, newer than the "),
        (to_all(class_names=None), "not a checkpoint of cifarnet"),
        (to_all(image_size="x"), "not a checkpoint of cifarnet"),
        (lambda checkpoint: checkpoint["hyper_parameters"].pop("config"), "not a checkpoint of cifarnet"),
        (to_all(precision="x"), "precision=x"),
        (to("module", tta="x"), "tta=x"),
    ],
)
def test_altered_checkpoints_run_nothing(changed, command, tmp_path, monkeypatch, alter, named):
    monkeypatch.chdir(tmp_path)
    path = changed(alter)
    status, _, error = command(path)
    assert status == 1
    assert named in error
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == [path.name]


def test_other_data_may_not_be_smuggled_in(changed, command, tmp_path, monkeypatch):
    """What is kept of a checkpoint's data settings beside `data=…` are numbers."""
    monkeypatch.chdir(tmp_path)
    path = changed(to("data", val_fraction="{_target_: os.mkdir, path: exploded}"))
    status, _, error = command(path, *QUICK, "data=synthetic", "data.train_size=200", "data.test_size=20")
    assert status == 0, error
    assert not (tmp_path / "exploded").exists()


def test_damaged_files_are_told(run, command, tmp_path):
    whole = (run / "checkpoints/best.ckpt").read_bytes()
    for name, content in [("truncated", whole[: len(whole) // 2]), ("empty", b""), ("other", b"no checkpoint")]:
        (tmp_path / name).write_bytes(content)
        status, _, error = command(tmp_path / name)
        assert status == 1
        assert f"{tmp_path / name} is not a checkpoint of cifarnet, or is damaged" in error
        assert "Traceback" not in error
    status, _, error = command(tmp_path)
    assert status == 1
    assert f"There is no checkpoint {tmp_path}/checkpoints/best.ckpt" in error


def test_newer_checkpoints_are_refused_everywhere(changed):
    path = changed(to_all(cifarnet="999"))
    for use in (cifarnet.load, evaluate):
        with pytest.raises(UserError, match=rf"cifarnet 999, newer than the {cifarnet.__version__} installed"):
            use(path)


@pytest.mark.parametrize("text", ["a, (b)=[c] 'd'", "end\\", "'\\'", "null", "1", "", " ✗\n", '"', "a#b,~c: {d}", "$e"])
def test_hydra_reads_what_a_checkpoint_says(text):
    """As text, whatever characters it has."""
    values = {"root": text, "train_sizes": [text, 1, None, True, 1e-9], "val_fraction": 0.1, "url": None}
    config = cli.compose("evaluate", [f"++data.{key}={plain(value)}" for key, value in values.items()])
    assert config.data == values


class OwnData(Synthetic):
    pass


def test_own_classes_by_an_explicit_option(config, tmp_path):
    own = ["~model", "+model={_target_: conftest.OwnNetwork}", f"data._target_={__name__}.OwnData"]
    train(config(*own, without="model"))
    network, data = "conftest.OwnNetwork", f"{__name__}.OwnData"
    with pytest.raises(UserError, match=rf"{data}, which is no class .*classes=\[module"):
        evaluate(tmp_path / "run", QUICK)
    with pytest.raises(UserError, match=rf"{data}, which is no class"):
        evaluate(tmp_path / "run", [*QUICK, f"classes=[{network}]"])
    with pytest.raises(UserError, match=rf"{network}, which is no class"):
        evaluate(tmp_path / "run", [*QUICK, f"classes=[{data}]"])
    measured = evaluate(tmp_path / "run", [*QUICK, f"classes=[{network},{data}]"])
    assert measured["network"] == "OwnNetwork"
    assert measured["data"]["source"] == "OwnData"
    other = evaluate(tmp_path / "run", [*QUICK, f"classes=[{network}]", "data=synthetic", f"data._target_={data}"])
    assert other["data"]["source"] == "OwnData"  # the user names it


def test_precision_is_that_of_training_whatever_auto_means_here(changed):
    def alter(checkpoint):
        assert checkpoint["hyper_parameters"]["precision"] == "32-true"
        to("trainer", precision="auto")(checkpoint)
        to_all(precision="bf16-mixed")(checkpoint)

    assert evaluate(changed(alter), QUICK)["precision"] == "bf16-mixed"
    assert evaluate(changed(alter), [*QUICK, "precision=32-true"])["precision"] == "32-true"


def test_diverged_network_is_told(changed):
    def alter(checkpoint):
        checkpoint["state_dict"]["network.normalize.mean"][0] = float("nan")

    with pytest.raises(UserError, match="training diverged"):
        evaluate(changed(alter), QUICK)


def test_a_full_disk_is_told_and_leaves_what_was_there(run, evaluated, command, monkeypatch, tmp_path):
    before = {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    status, _, error = command(run, *QUICK)
    assert status == 1
    assert re.fullmatch(r"Error: \S+ cannot be written: No space left on device\..*\n", error)
    assert {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()} == before


def test_names_from_strangers_do_nothing_on_the_page(evaluated):
    named = {**evaluated, "network": "<script>a()</script>", "checkpoint": "<img src=x onerror=b()>"}
    named["classes"] = [{**row, "name": "<b>c</b>"} for row in evaluated["classes"]]
    html = report.render(named, {})
    for harmful in ("<script>", "<img", "<b>"):
        assert harmful not in html
    assert "&lt;b&gt;c&lt;/b&gt;" in html


def test_help_is_quick_and_complete():
    program = "import sys; from cifarnet.evaluate import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 3  # a second, on a machine that does nothing else
    for line in (CONFIGS / "evaluate.yaml").read_text().splitlines()[1:]:
        assert line in result.stdout
    assert "python -m cifarnet.evaluate lightning_logs" in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_the_processor(run, evaluated):
    measured = evaluate(run, [*QUICK, "accelerator=gpu"])
    assert measured["hardware"]["device"] == "cuda"
    assert measured["test"]["accuracy"] == pytest.approx(evaluated["test"]["accuracy"], abs=0.01)


def test_run_on_photographs(config, few_photographs, tmp_path):
    """The settings of a folder of pictures come from the checkpoint, and may be given anew."""
    train(config("data=folder", f"data.root={few_photographs}", "data.batch_size=32", without="data"))
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    few_photographs.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"few, which is no folder here. Say where: data\.root="):
        evaluate(tmp_path / "run", QUICK)
    measured = evaluate(tmp_path / "run", [*QUICK, f"data.root={tmp_path / 'moved'}"])
    assert measured["test"]["accuracy"] == trained["test_accuracy"]
    assert measured["data"] == trained["data"]


def test_a_link_in_a_strangers_run_leads_nowhere(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "run/evaluation").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="evaluation is a link that leads out of"):
        make_folder(None, tmp_path / "run/checkpoints/best.ckpt")
    assert make_folder(str(tmp_path / "run/evaluation"), tmp_path / "best.ckpt").is_dir()
