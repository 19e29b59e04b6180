import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cifarnet
from cifarnet import cli
from cifarnet.checkpoint import Checkpoint
from cifarnet.data import ImageFolder, Synthetic
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate, main
from cifarnet.inference import ensemble
from cifarnet.inference.ensemble import Ensemble
from cifarnet.inference.predictor import Predictor
from cifarnet.models import CNN
from cifarnet.train import train
from conftest import LEARNS, alter, picture

QUICK = ["corruptions=false", "tta=none"]
SETTINGS = cli.compose("evaluate", [])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder of two runs with different seeds, whose networks have batch norms."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed in range(2):
        train(cli.compose("train", [*LEARNS, f"seed={seed}", f"output_dir={folder}/{seed}"]))
    return folder


@pytest.fixture(scope="module")
def classifiers(sweep):
    return [cifarnet.load(sweep / str(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def evaluated(sweep, tmp_path_factory):
    """The evaluation of the sweep, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    return evaluate(sweep, [*QUICK, "soup=true", f"output_dir={folder}"]), folder


@pytest.fixture(scope="module")
def images():
    """The training and test images of the runs, without those for validation, and the labels of the test images."""
    source = Synthetic(train_size=300, test_size=60).source
    return source.train.images, source.test.images, source.test.labels


@pytest.fixture
def command(command):
    """Run `python -m cifarnet.evaluate …` in this process, and return its exit status, stdout and stderr."""
    return lambda *arguments: command(*map(str, arguments), main=main)


@torch.no_grad()
def mean_probabilities(networks, images):
    total = torch.zeros(len(images), 10)
    for network in networks:
        for row, image in enumerate(images):
            total[row] += network(image[None]).softmax(1)[0]
    return total / len(networks)


def soup_by_hand(classifiers, images):
    """Average the weights one by one, and compute the statistics of batch norms from all training images."""
    soup = copy.deepcopy(classifiers[0].network)
    for name, weight in soup.named_parameters():
        weight.data = sum(dict(one.network.named_parameters())[name].data for one in classifiers) / len(classifiers)
    soup.train()
    for layer in soup.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(set_statistics)
    with torch.no_grad():
        soup(images)
    return soup.eval()


def set_statistics(layer, inputs):
    if layer.training:
        values = inputs[0].double().transpose(0, 1).flatten(1)  # [C, N * H * W]
        layer.expected = values.mean(1), values.var(1)


def test_probabilities_are_the_means_of_those_of_the_networks(classifiers, evaluated, images):
    _, test, labels = images
    expected = mean_probabilities([classifier.network for classifier in classifiers], test)
    members = {str(number): classifier.predictor(tta="none") for number, classifier in enumerate(classifiers)}
    batches = [Batch(test[index], labels[index], index) for index in torch.arange(60).split(25)]
    predictions = Ensemble(members).predict_all(batches, "test")
    torch.testing.assert_close(predictions.logits.softmax(1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(predictions.one_view, predictions.logits)
    assert torch.equal(predictions.labels, labels)
    assert torch.equal(predictions.index, torch.arange(60))

    record, _ = evaluated
    right = expected.argmax(1) == labels
    assert record["test"]["accuracy"] == right.sum().item() / 60
    assert record["test"]["cross_entropy"] == pytest.approx(-expected[range(60), labels].log().mean().item(), rel=1e-4)
    for classifier, row in zip(classifiers, record["members"]["runs"], strict=True):
        probabilities = mean_probabilities([classifier.network], test)
        assert row["accuracy"] == (probabilities.argmax(1) == labels).sum().item() / 60
        cross_entropy = -probabilities[range(60), labels].log().mean().item()
        assert row["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-4)
        assert row["checkpoint"] == str(classifier.checkpoint.path)


def test_logits_of_improbable_classes_are_finite():
    logits = [torch.tensor([[1000.0, 0, -1000]]), torch.tensor([[0, 1000.0, -1000]])]
    combined = ensemble.combine(logits)
    assert combined.isfinite().all()
    torch.testing.assert_close(combined.softmax(1), torch.tensor([[0.5, 0.5, 0]]), atol=1e-3, rtol=0)


def test_each_network_keeps_the_settings_of_its_test(sweep, images):
    runs, test, labels = [cifarnet.load(sweep / str(seed)) for seed in range(2)], images[1], images[2]
    runs[0].tested = {"tta": "mirror", "precision": "32-true"}
    runs[1].tested = {"tta": "none", "precision": "bf16-mixed"}
    combined = ensemble.make_predictor(runs, cli.compose("evaluate", ["tta_share=1", "accelerator=cpu"]))
    first, second = (copy.deepcopy(run.network).to(memory_format=torch.channels_last) for run in runs)
    test = test.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halved = second(test).float().softmax(1)
    with torch.no_grad():
        mirrored = ((first(test) + first(test.flip(3))) / 2).softmax(1)
        exact = second(test).softmax(1)
    assert (halved - exact).abs().max() > 1e-4
    logits = combined.predict_all([Batch(test, labels, torch.arange(60))], "test").logits
    torch.testing.assert_close(logits.softmax(1), (mirrored + halved) / 2, atol=1e-5, rtol=0)
    assert (combined.tta, combined.precision) == ("mirror / none", "32-true / bf16-mixed")
    overridden = ensemble.make_predictor(runs, cli.compose("evaluate", ["precision=32-true", "tta=none"]))
    assert (overridden.tta, overridden.precision) == ("none", "32-true")


def predictors(classifiers):
    return [classifier.predictor(tta="none", accelerator="cpu") for classifier in classifiers]


def test_weights_of_a_soup_are_the_means_of_the_weights(classifiers):
    members = predictors(classifiers)
    soup = ensemble.make_soup(members, Synthetic(train_size=300, test_size=60)).network.state_dict()
    first, second = (classifier.network.state_dict() for classifier in classifiers)
    names = [name for name, _ in classifiers[0].network.named_parameters()]
    assert any(not torch.equal(first[name], second[name]) for name in names)
    for name in names:
        torch.testing.assert_close(soup[name], (first[name] + second[name]) / 2)
    for member, weights in zip(members, (first, second), strict=True):  # the networks themselves are unchanged
        for name, weight in member.network.state_dict().items():
            assert torch.equal(weight, weights[name])


def test_statistics_of_a_soup_are_those_of_the_training_images(classifiers, evaluated, images):
    train_images, test, labels = images
    by_hand = soup_by_hand(classifiers, train_images)
    predictor = ensemble.make_soup(predictors(classifiers), Synthetic(train_size=300, test_size=60))
    assert not any(layer.training for layer in predictor.network.modules())
    for found, layer in zip(norms(predictor.network), norms(by_hand), strict=True):
        mean, variance = layer.expected
        torch.testing.assert_close(found.running_mean.double(), mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.running_var.double(), variance, atol=1e-4, rtol=1e-4)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    probabilities = mean_probabilities([by_hand], test)
    record, _ = evaluated
    assert record["members"]["soup"]["accuracy"] == (probabilities.argmax(1) == labels).sum().item() / 60
    cross_entropy = -probabilities[range(60), labels].log().mean().item()
    assert record["members"]["soup"]["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-3)


def norms(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_images_have_the_same_weight_in_all_batches(classifiers):
    """The input of the first batch norm does not depend on statistics: its mean is that of all images."""
    data = Synthetic(train_size=1200, test_size=60, val_fraction=0)
    by_hand = soup_by_hand(classifiers, data.source.train.images)
    soup = ensemble.make_soup(predictors(classifiers), data)
    mean, _ = norms(by_hand)[0].expected
    torch.testing.assert_close(norms(soup.network)[0].running_mean.double(), mean, atol=1e-5, rtol=1e-4)


def test_statistics_are_those_of_streamed_images_too(classifiers, tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            for i in range(10):
                picture(tmp_path / split / name / f"{i}.png", (20 * i, 100 * number, 50))
    found = []
    for in_memory in (True, False):
        data = ImageFolder(str(tmp_path), in_memory=in_memory, val_fraction=0.2)
        found.append(norms(ensemble.make_soup(predictors(classifiers), data).network)[-1].running_mean)
    torch.testing.assert_close(*found)


def test_the_soup_of_a_network_without_batch_norms_reads_no_images():
    predictor = Predictor(CNN(num_classes=3, image_size=8, widths=[4, 4], hidden=8).eval(), accelerator="cpu")
    data = SimpleNamespace(source=SimpleNamespace(train=range(10)), loader=unreadable)
    soup = ensemble.make_soup([predictor, predictor], data)
    for name, weight in soup.network.state_dict().items():
        assert torch.equal(weight, predictor.network.state_dict()[name])


def unreadable(*_):
    yield from ()
    raise AssertionError


def test_means_and_deviations(evaluated):
    members = evaluated[0]["members"]
    for key in ("accuracy", "cross_entropy", "calibration_error", "brier"):
        one, other = (run[key] for run in members["runs"])
        assert members["mean"][key] == pytest.approx((one + other) / 2)
        assert members["deviation"][key] == pytest.approx(abs(one - other) / 2**0.5)


def test_the_record_of_an_ensemble(evaluated, sweep, classifiers):
    record, folder = evaluated
    parameters = sum(weight.numel() for weight in classifiers[0].network.parameters())
    assert record["parameters"] == 2 * parameters
    assert (record["checkpoint"], record["network"]) == ("an ensemble of 2 runs", "SpeedNet")
    assert record["command"].startswith(f"python -m cifarnet.evaluate {sweep}/0/checkpoints/")
    assert record["training_settings"] == {}
    assert record["members"] == json.loads((folder / "metrics.json").read_text())["members"]
    assert not (folder / "accuracy.png").exists()
    assert classifiers[0].evaluation() is None


def test_a_sweep_is_the_ensemble_of_its_runs(command, sweep, tmp_path):
    status, printed, error = command(sweep, *QUICK)
    assert status == 0, error
    (folder,) = (tmp_path / "lightning_logs/ensemble").iterdir()
    record = json.loads((folder / "metrics.json").read_text())
    assert "SpeedNet in 2 runs, on Synthetic: 30 validation and 60 test images" in printed
    lines = [line.split()[:3] for line in printed.splitlines()]
    for name, row in zip(("0", "1", "ensemble"), [*record["members"]["runs"], record["test"]], strict=True):
        assert [name, f"{row['accuracy']:.0%}", f"{row['cross_entropy']:.4f}"] in lines
    assert f"{record['members']['disagreement']['share']:.0%}" in printed


def test_each_ensemble_has_a_new_folder(command, sweep, tmp_path):
    for _ in range(2):
        assert command(sweep / "0", sweep / "1", *QUICK)[0] == 0
    folders = list((tmp_path / "lightning_logs/ensemble").iterdir())
    assert len(folders) == 2
    page = (folders[0] / "report.html").read_text()
    assert "Evaluation of an ensemble of 2 runs" in page
    assert "The runs and their ensemble" in page
    assert str(sweep / "1/checkpoints/best.ckpt") in page


def test_each_run_counts_once(command, sweep, tmp_path):
    copied = shutil.copytree(sweep / "0", tmp_path / "copied")
    assert command(copied, copied / "checkpoints/best.ckpt", *QUICK)[0] == 0
    assert json.loads((copied / "evaluation/metrics.json").read_text())["members"] is None
    record = evaluate([copied, sweep, sweep / "1"], [*QUICK, f"output_dir={tmp_path}/three"])
    assert len(record["members"]["runs"]) == 3


def test_the_records_of_runs_are_kept(sweep):
    before = (sweep / "0/metrics.json").read_bytes()
    with pytest.raises(UserError, match="is the folder of a run"):
        evaluate(sweep, [*QUICK, f"output_dir={sweep}/0"])
    assert (sweep / "0/metrics.json").read_bytes() == before


def test_finished_runs_with_checkpoints_are_found(tmp_path):
    for name, files in {
        "10": ["metrics.json", "checkpoints/best.ckpt"],
        "2": ["metrics.json", "checkpoints/last.ckpt", "evaluation/metrics.json"],
        "removed": ["metrics.json"],
        "unfinished": ["checkpoints/last.ckpt"],
    }.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    last, best = tmp_path / "2/checkpoints/last.ckpt", tmp_path / "10/checkpoints/best.ckpt"
    assert ensemble.expand(tmp_path) == [last, best]
    assert ensemble.expand(tmp_path / "2") == [last]
    assert ensemble.expand(best) == [best]
    assert ensemble.expand(tmp_path / "removed") == [tmp_path / "removed/checkpoints/best.ckpt"]
    assert ensemble.expand("nowhere") == [Path("nowhere")]


def altered(sweep, folder, *changes):
    """Return altered copies of the checkpoint of the first run."""
    paths = [shutil.copy(sweep / "0/checkpoints/best.ckpt", folder / f"{i}.ckpt") for i in range(len(changes))]
    for path, change in zip(paths, changes, strict=True):
        alter(path, lambda content, change=change: change(content["hyper_parameters"]))
    return paths


@pytest.mark.parametrize(("name", "other"), [("fold", {"folds": 4, "fold": 1}), ("train_size", {"train_size": 400})])
def test_runs_that_were_validated_on_different_images(command, sweep, tmp_path, name, other):
    divisions = [{"folds": 4, "fold": 0}, other] if name == "fold" else [{"train_size": 300}, other]
    paths = altered(sweep, tmp_path, *(lambda hparams, one=one: hparams["data"].update(one) for one in divisions))
    status, printed, error = command(*paths, *QUICK, "output_dir=both")
    assert status == 0, error
    assert f"Without validation images, because data.{name} differs between the runs" in printed
    record = json.loads((tmp_path / "both/metrics.json").read_text())
    assert record["val"] is record["temperature"] is None
    assert (record["data"]["train"], record["data"]["val"]) == (300, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": list("abcdefghij")}, "The data has the classes disc, ring"),
        ({"image_size": 33}, "The images are 32 pixels wide"),
    ],
)
def test_runs_with_other_classes_or_images_are_refused(command, sweep, tmp_path, changes, message):
    (path,) = altered(sweep, tmp_path, lambda hparams: hparams.update(changes))
    status, _, error = command(sweep / "0", path, *QUICK)
    assert status == 1
    assert message in error
    assert f"{path} was trained on" in error
    assert error.count("\n") == 1


def test_runs_on_different_data_sets_are_refused(sweep):
    first = Checkpoint.open(sweep / "0")
    second = replace(first, data=first.data | {"_target_": "cifarnet.data.CIFAR10"})
    with pytest.raises(UserError, match=r"trained on cifarnet\.data\.CIFAR10 and cifarnet\.data\.Synthetic\. Evaluate"):
        ensemble.check([first, first, second], SETTINGS)
    assert ensemble.check([second], SETTINGS) == []


def test_runs_that_fit_together(sweep, capsys):
    first = Checkpoint.open(sweep / "0")
    unknown = replace(first, data={name: value for name, value in first.data.items() if name != "_target_"})
    assert ensemble.check([first, unknown], SETTINGS) == []
    assert capsys.readouterr().out == ""
    larger = replace(first, data=first.data | {"val_fraction": 0})
    assert "++data.val_fraction=0" in ensemble.check([first, larger], SETTINGS)
    assert "data.val_fraction differs" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["attack=pgd", "features=true", "ood=noise"])
def test_settings_that_need_one_network(command, sweep, setting):
    status, _, error = command(sweep, *QUICK, setting)
    assert status == 1
    assert f"{setting.replace('true', 'True')} needs a single run, but got 2. Remove" in error
    assert error.count("\n") == 1


def test_a_soup_needs_runs_of_one_network(command, sweep, config, tmp_path):
    settings = ["data.train_size=300", "data.test_size=60", "trainer.max_epochs=1", "threads=1"]
    train(config(*settings, without=("data.t", "trainer.max_epochs")))
    status, _, error = command(sweep / "0", tmp_path / "run", *QUICK, "soup=true")
    assert status == 1
    assert "soup=true needs several runs of the same network with the same settings. Remove soup" in error
    assert error.count("\n") == 1
    status, _, error = command(sweep / "0", *QUICK, "soup=true")
    assert status == 1
    assert "soup=true needs several runs" in error
    measured = evaluate([sweep / "0", tmp_path / "run"], [*QUICK, f"output_dir={tmp_path}/both"])
    assert measured["network"] == "SpeedNet + CNN"
