"""What is exported answers as the network does, or is not there; the folder to share is read back, and runs no code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import cifarnet
from cifarnet import checkpoint, cli
from cifarnet.errors import UserError
from cifarnet.evaluate import evaluate
from cifarnet.export import RANGES, TYPES, export, main
from cifarnet.formats import hub, onnx
from cifarnet.inference import test_images
from cifarnet.train import train
from conftest import LEARNS, picture


@pytest.fixture
def images():
    return torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def logits(network, images):
    with torch.no_grad():
        return network(images)


def record(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_onnx_needs_nothing_but_onnxruntime(run, command, images):
    status, out, err = command(str(run), main=main)
    assert status == 0, err
    assert "network.onnx: 60 test images, in batches of 1, 7, 64, get the same answers.\nThe largest difference" in out
    session = onnxruntime.InferenceSession(run / "exported/network.onnx")
    expected = logits(cifarnet.load(run).network, images)
    for batch in (images, images[:1]):
        (answers,) = session.run(["logits"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(answers), expected[: len(batch)], rtol=0, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == cifarnet.load(run).class_names
    assert json.loads(told["test_accuracy"]) == record(run)["test_accuracy_one_view"]
    assert (told["image_size"], told["name"]) == ("32", record(run)["name"])
    assert told["input"].startswith("uint8 [batch, 3, 32, 32]")


def test_torch_export_runs_where_this_project_is_not(run, images, tmp_path):
    path = export(run, ["format=torch_export", f"output={tmp_path}/cnn.pt2", "data=synthetic", "data.test_size=10"])
    torch.save((images, logits(cifarnet.load(run).network, images)), tmp_path / "expected.pt")
    program = (
        "import sys, torch; sys.modules['cifarnet'] = None; import json; told = {'cifarnet.json': ''};"
        f"network = torch.export.load({str(path)!r}, extra_files=told).module();"
        f"images, expected = torch.load({str(tmp_path / 'expected.pt')!r});"
        "print((network(images) - expected).abs().max().item() < 1e-5, json.loads(told['cifarnet.json'])['image_size'])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True 32\n"


@pytest.mark.slow  # it compiles
def test_images_that_are_decoded_when_they_are_needed(tmp_path):
    for split, count in {"train": 10, "test": 5}.items():
        for name in ("a", "b"):
            for i in range(count):
                picture(tmp_path / "pictures" / split / name / f"{i}.png")
    base = [setting for setting in LEARNS if not setting.startswith(("data", "model", "optimizer"))]
    images = [
        "optimizer=adamw",
        "data=folder",
        f"data.root={tmp_path}/pictures",
        "data.in_memory=false",
        "data.batch_size=5",
    ]
    train(cli.compose("train", [*base, *images, f"output_dir={tmp_path}/run"]))
    assert export(tmp_path / "run", ["images=4"]).is_file()
    path = checkpoint.find(tmp_path / "run")
    content = checkpoint.read(path)
    config = test_images.configure("export", content, path, [], TYPES, RANGES)
    shown, labels = test_images.some(config, content, 4)
    assert shown.is_contiguous()  # AOTInductor's code does not look at strides
    assert labels == [0, 0, 1, 1]


class Branches(nn.Module):
    """No graph holds it: what it computes depends on what it sees."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean((2, 3))
        return self.head(mean) if mean.sum() > 0 else self.head(-mean)


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_a_network_that_no_graph_holds(form, tmp_path, command):
    base = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "module.tta"))]
    own = ["~model", "+model={_target_: test_export.Branches}", "optimizer=adamw", f"output_dir={tmp_path}/run"]
    train(cli.compose("train", [*base, *own]))
    _, _, err = command(f"{tmp_path}/run", f"format={form}", "classes=[test_export.Branches]", main=main)
    assert err.splitlines()[-1].startswith(f"Error: format={form} cannot hold this network (")
    assert not list((tmp_path / "run/exported").iterdir())
    shared = export(tmp_path / "run", ["format=hub", "classes=[test_export.Branches]"])
    assert isinstance(cifarnet.load(shared, classes=[Branches]).network.network, Branches)


@pytest.mark.parametrize("model", ["cnn", "resnet20", "vit", "convmixer"])
def test_networks_of_other_kinds(model, tmp_path):
    base = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "module.tta"))]
    short = ["data.train_size=60", f"model={model}", "optimizer=adamw", f"output_dir={tmp_path}"]
    short += ["+model.depth=2"] if model == "vit" else []
    train(cli.compose("train", [*base, *short]))
    export(tmp_path, ["images=8"])
    export(tmp_path, ["images=8", "format=torch_export"])
    assert onnx.load(tmp_path / "exported/network.onnx")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize("wrong", [lambda answers: answers + 1e-3, lambda answers: answers[:, :-1], lambda a: a / 0])
def test_what_answers_otherwise_is_not_kept(run, monkeypatch, tmp_path, wrong):
    load = onnx.load
    monkeypatch.setattr(onnx, "load", lambda path, _: lambda images: wrong(load(path)(images)))
    with pytest.raises(UserError, match=r"answers otherwise than the network: by .* in a batch of 1 "):
        export(run, [f"output={tmp_path}/network.onnx"])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_used(run, command, monkeypatch, tmp_path):
    tmp_path.joinpath("folder.onnx").mkdir()
    tmp_path.joinpath("mine").mkdir()
    tmp_path.joinpath("mine/README.md").write_text("mine")
    for given, told in {
        "format=onx": "format=onx is not known. Did you mean onnx? There are: hub, onnx, torch_export.",
        "images=0": "images=0: give a number from 1.",
        "output=folder.onnx": "folder.onnx is a folder, which what is written is not.",
        "output=network": "output=network: name a file with .onnx: network.onnx",
        "format=hub output=mine": "mine holds other files, which might be overwritten. Choose a new folder.",
        "format=hub output=a.onnx": "output=a.onnx: name a folder with no ending: hub",
        "output=/dev/null/x.onnx": "output=/dev/null/x.onnx cannot be written (",
        "data.root=a": "data.root",
    }.items():
        status, _, err = command(str(run), *given.split(), main=main)
        assert (status, told in err) == (1, True), err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "cifarnet.formats.onnx")
    assert "format=onnx needs onnxruntime: pip install 'cifarnet[export]'" in command(str(run), main=main)[2]


def test_without_the_run_s_images_random_pixels_are_compared(changed, command, tmp_path):
    def alter(checkpoint):
        data = checkpoint["hyper_parameters"]["config"]["data"]
        data.update(_target_="cifarnet.data.folder.ImageFolder", root="/nowhere", image_size=32)

    run = changed(alter)
    status, out, err = command(str(run), f"output={tmp_path}/network.onnx", "images=20", main=main)
    assert status == 0, err
    assert "No test images to check with: " in out
    assert "/nowhere, which is no folder here" in out
    assert "network.onnx: 20 random images, in batches of 1, 7, 64, get the same answers." in out
    status, _, err = command(str(run), "data=folder", "data.root=/neither", main=main)
    assert (status, "/neither" in err) == (1, True), err
    shared = export(run, ["format=hub", f"output={tmp_path}/shared", "images=20"])
    status, out, err = command(str(shared), f"output={tmp_path}/again.onnx", main=main)
    assert (status, "shared does not say what it was trained on." in out) == (0, True), err


def test_images_that_are_here_but_cannot_be_used_are_told(changed, command):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["config"]["data"]["_target_"] = "os.system"

    status, out, err = command(str(changed(alter)), main=main)
    assert (status, out) == (1, "")
    assert "asks for the class os.system" in err


def test_a_stranger_s_checkpoint_runs_nothing(changed, run, command):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["config"]["model"]["_target_"] = "os.system"

    status, _, err = command(str(changed(alter)), main=main)
    assert status == 1
    assert "asks for the class os.system, which is no class that this project lists" in err


def test_a_folder_to_share_is_loaded_back(run, images, command, tmp_path):
    folder = export(run, ["format=hub", f"output={tmp_path}/shared"])
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    original, shared = cifarnet.load(run), cifarnet.load(folder)
    assert torch.equal(logits(shared.network, images), logits(original.network, images))
    assert (shared.class_names, shared.image_size, shared.epoch, shared.tested) == (
        *(original.class_names, original.image_size, original.epoch, original.tested),
    )
    assert [of.probabilities for of in shared.predict(images)] == [of.probabilities for of in original.predict(images)]
    theirs = hub.HubNetwork.from_pretrained(folder)
    assert torch.equal(logits(theirs.eval(), images), logits(original.network, images))
    evaluated = evaluate(folder, ["data=synthetic", "data.test_size=60", "corruptions=false", "data.train_size=300"])
    assert evaluated["test"]["images"] == 60
    with pytest.raises(UserError, match=r"does not say what it was trained on\. Say what to test on: data="):
        evaluate(folder)
    assert Path(folder / "model.safetensors").stat().st_mode == Path(folder / "README.md").stat().st_mode
    with pytest.raises(UserError, match=r"there is no .*Fit one: python -m cifarnet\.evaluate .* data=…"):
        cifarnet.load(shutil.copytree(folder, tmp_path / "moved")).temperature("evaluation")


def test_the_temperature_travels(run, tmp_path):
    trained = shutil.copytree(run, tmp_path / "run")
    measured = evaluate(trained, ["corruptions=false"])
    shared = cifarnet.load(export(trained, ["format=hub", f"output={tmp_path}/shared"]))
    assert shared.temperature("evaluation") == measured["temperature"] != 1
    again = export(tmp_path / "shared", ["format=hub", f"output={tmp_path}/again", "data=synthetic"])
    assert cifarnet.load(again).temperature("evaluation") == measured["temperature"]
    with pytest.raises(UserError, match=r"there is no .*shared_evaluation/metrics\.json\. Fit one: .* data=…"):
        shared.temperature("evaluation", tta="none")
    other = evaluate(tmp_path / "shared", ["data=synthetic", "data.train_size=200", "corruptions=false", "tta=none"])
    assert shared.temperature("evaluation", tta="none") == other["temperature"]
    assert shared.temperature("evaluation") == measured["temperature"]  # its maker's
    settings = json.loads((tmp_path / "shared/config.json").read_text())
    for wrong in ([1], 3, "x", {"tta": "mirror"}, *({"tta": "mirror", "temperature": of} for of in (True, -1.0, "1"))):
        (tmp_path / "shared/config.json").write_text(json.dumps(settings | {"evaluation": wrong}))
        with pytest.raises(UserError, match=r"config\.json is damaged .* Download it anew"):
            shared.temperature("evaluation")


def test_the_card_tells_what_was_measured(run, tmp_path):
    card = export(run, ["format=hub", f"output={tmp_path}/hub"]).joinpath("README.md").read_text()
    assert f"test accuracy  {record(run)['test_accuracy']:.2%}" in card
    assert "SpeedNet" in card
    assert "Synthetic: 270 images to train, 30 to validate" in card
    measured = evaluate(run, ["corruptions=false"])
    card = export(run, ["format=hub", f"output={tmp_path}/hub"]).joinpath("README.md").read_text()
    assert f"Brier score           {measured['test']['brier']:.4f}" in card
    assert "By `python -m cifarnet.evaluate`" in card


def test_places_on_a_machine_are_left_out_of_the_card():
    typed = ["+experiment=baseline", "data.root=/home/me/pictures", "ckpt_path=C:\\me\\last.ckpt", "seed=3"]
    assert hub.typed(typed) == ["+experiment=baseline", "data.root=…", "ckpt_path=…", "seed=3"]


def test_an_evaluation_of_other_images_or_of_earlier_weights_is_not_told(run, tmp_path):
    def card_of(copy, **changed):
        file = copy / "evaluation/metrics.json"
        written = json.loads(file.read_text()) | changed
        file.write_text(json.dumps(written))
        return hub.card(cifarnet.load(copy))

    evaluate(run, ["corruptions=false"])
    copy = shutil.copytree(run, tmp_path / "copy")
    told = "By `python -m cifarnet.evaluate`"
    assert told in card_of(copy)
    assert "Synthetic, with tta=mirror, in 32-true" in card_of(copy)
    data = json.loads((copy / "evaluation/metrics.json").read_text())["data"]
    assert told not in card_of(copy, data=data | {"sha256": "other"})
    assert told not in card_of(copy, data=data, finished="2000-01-01T00:00:00+00:00")
    assert told not in card_of(copy, finished="9000-01-01T00:00:00+00:00", checkpoint="last.ckpt")


@pytest.mark.parametrize("changed", [{"partial": "limit_test_batches=1"}, {"tested_step": 1}])
def test_a_run_that_was_cut_short_and_other_steps_weights_have_no_result(run, tmp_path, changed):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "metrics.json").write_text(json.dumps(record(run) | changed))
    assert cifarnet.load(run).record()
    assert cifarnet.load(copy).record() == {}


def test_nothing_is_written_where_a_stranger_s_links_lead(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "exported", ignore_errors=True)
    (tmp_path / "mine").mkdir()
    (copy / "exported").mkdir()
    (copy / "exported/hub").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link that leads out of"):
        export(copy, ["format=hub"])
    assert not list((tmp_path / "mine").iterdir())


def test_a_shared_folder_is_known_by_any_name(run, tmp_path, monkeypatch):
    folder = export(run, ["format=hub", f"output={tmp_path}/mine-v1"])
    monkeypatch.chdir(folder)
    assert export(".", ["data=synthetic", "data.test_size=10"]) == tmp_path / "mine-v1_exported/network.onnx"


def test_a_record_of_other_weights_is_not_told(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps(record(run) | {"tested_epoch": 7}))
    card = export(tmp_path, ["format=hub"]).joinpath("README.md").read_text()
    assert "Nothing: the record of its run was not at hand." in card
    (tmp_path / "metrics.json").write_text(json.dumps(record(run) | {"hardware": 3}))
    with pytest.raises(UserError, match=r"metrics.json is damaged .*its hardware"):
        export(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(record(run) | {"hardware": {}, "epochs": 10**400}))
    with pytest.raises(UserError, match=r"A record of .* is damaged"):
        export(tmp_path, ["format=hub"])
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        export(tmp_path)


def test_names_are_shown_as_text_in_the_card(changed, run):
    def alter(checkpoint):
        names = checkpoint["hyper_parameters"]["class_names"]
        names[:2] = ["<script>alert(1)</script>", "\x1b[2J```\n# [hello](http://example.org)"]

    classifier = cifarnet.load(changed(alter))
    card = hub.card(classifier)
    fenced = [line.startswith("```") for line in card.splitlines()]
    outside = "\n".join(line for place, line in enumerate(card.splitlines()) if sum(fenced[:place]) % 2 == 0)
    assert "<script>" in card
    assert "<script>" not in outside
    assert "example.org" not in outside
    assert "\x1b" not in card


@pytest.mark.parametrize("target", ["os.system", "torch.load", "cifarnet.evaluate.evaluate", 3, None])
def test_a_stranger_s_shared_folder_runs_nothing(run, tmp_path, target):
    folder = export(run, ["format=hub", f"output={tmp_path}/shared"])
    config = json.loads((folder / "config.json").read_text())
    config["model"]["_target_"] = target
    (folder / "config.json").write_text(json.dumps(config))
    for load in (cifarnet.load, hub.HubNetwork.from_pretrained):
        with pytest.raises(UserError, match="asks for the class"):
            load(folder)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ({"model": 3}, "is damaged"),
        ({"image_size": "x"}, "is damaged"),
        ({"cifarnet": "99.0"}, "newer than"),
        ({"class_names": ["a", "b"]}, "is damaged, or its network has changed since"),
    ],
)
def test_a_damaged_shared_folder_is_told(run, tmp_path, settings, told):
    folder = export(run, ["format=hub", f"output={tmp_path}/shared"])
    file = folder / "config.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=told):
        cifarnet.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is damaged"):
        cifarnet.load(folder)
