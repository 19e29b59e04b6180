"""Export: the exported network agrees with the original, and a shared folder can be loaded and runs no code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from torch import nn

import cifarnet
from cifarnet import cli
from cifarnet.errors import NoImages, UserError
from cifarnet.evaluate import evaluate
from cifarnet.export import export, main
from cifarnet.formats import hub, onnx
from cifarnet.inference import test_images
from cifarnet.train import train
from conftest import LEARNS, picture


@pytest.fixture
def images():
    return torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


EVALUATED = "`python -m cifarnet.evaluate` measured"


def logits(network, images):
    with torch.no_grad():
        return network(images)


def record(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_onnx_runs_with_onnxruntime(run, command, images):
    status, out, err = command(str(run), main=main)
    assert status == 0, err
    assert (
        "network.onnx: the same predictions on 60 test images, in batches of 1, 7, 64.\nThe largest difference" in out
    )
    session = onnxruntime.InferenceSession(run / "exported/network.onnx")
    expected = logits(cifarnet.load(run).network, images)
    for batch in (images, images[:1]):
        (answers,) = session.run(["logits"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(answers), expected[: len(batch)], rtol=0, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == cifarnet.load(run).class_names
    assert json.loads(facts["test_accuracy"]) == record(run)["test_accuracy_one_view"]
    assert (facts["image_size"], facts["name"]) == ("32", record(run)["name"])
    assert facts["input"].startswith("uint8 [batch, 3, 32, 32]")


def test_torch_export_runs_without_this_project(run, images, tmp_path):
    path = export(run, ["format=torch_export", f"output={tmp_path}/cnn.pt2", "data=synthetic", "data.test_size=10"])
    torch.save((images, logits(cifarnet.load(run).network, images)), tmp_path / "expected.pt")
    program = (
        "import sys, torch; sys.modules['cifarnet'] = None; import json; facts = {'cifarnet.json': ''};"
        f"network = torch.export.load({str(path)!r}, extra_files=facts).module();"
        f"images, expected = torch.load({str(tmp_path / 'expected.pt')!r});"
        "print((network(images) - expected).abs().max().item() < 1e-5, json.loads(facts['cifarnet.json'])['epoch'])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True 1\n"


def test_images_that_are_decoded_on_access(tmp_path):
    for split, count in {"train": 10, "test": 5}.items():
        for name in ("a", "b"):
            for i in range(count):
                picture(tmp_path / "pictures" / split / name / f"{i}.png")
    base = [setting for setting in LEARNS if not setting.startswith(("data", "model", "optimizer"))]
    images = ["optimizer=adamw", "data=folder", "data.in_memory=false", "data.batch_size=5"]
    root = f"data.root={tmp_path}/pictures"
    train(cli.compose("train", [*base, *images, root, f"output_dir={tmp_path}/run"]))
    checkpoint = cifarnet.load(tmp_path / "run").checkpoint
    with pytest.raises(NoImages, match=r"Add data\.root="):
        test_images.load("export", [], checkpoint, [])
    images, labels = test_images.sample(test_images.load("export", [root], checkpoint, []).source.test, 4)
    assert images.shape == (4, 3, 32, 32)
    assert images.is_contiguous()  # exported graphs may not look at strides
    assert labels == [0, 0, 1, 1]
    export(tmp_path / "run", ["format=onnx_int8", root, "tolerance=100"])


class Branches(nn.Module):
    """A network that no graph can represent, because its computation depends on its input."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean((2, 3))
        return self.head(mean) if mean.sum() > 0 else self.head(-mean)


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_unsupported_network(form, tmp_path, command):
    base = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "module.tta"))]
    branches = ["~model", "+model={_target_: test_export.Branches}", "optimizer=adamw", f"output_dir={tmp_path}/run"]
    train(cli.compose("train", [*base, *branches]))
    _, _, err = command(f"{tmp_path}/run", f"format={form}", "classes=[test_export.Branches]", main=main)
    assert err.splitlines()[-1].startswith(f"Error: format={form} does not support this network: ")
    assert not list((tmp_path / "run/exported").iterdir())
    shared = export(tmp_path / "run", ["format=hub", "classes=[test_export.Branches]"])
    assert isinstance(cifarnet.load(shared, classes=[Branches]).network.network, Branches)


@pytest.mark.parametrize("model", ["cnn", "resnet20", "vit", "convmixer"])
def test_other_networks(model, tmp_path, caplog):
    base = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "module.tta"))]
    short = ["data.train_size=60", f"model={model}", "optimizer=adamw", f"output_dir={tmp_path}"]
    short += ["+model.depth=2"] if model == "vit" else []
    train(cli.compose("train", [*base, *short]))
    export(tmp_path, ["images=8"])
    export(tmp_path, ["images=8", "format=torch_export"])
    caplog.clear()
    export(tmp_path, ["format=onnx_int8", "tolerance=100"])
    assert "WARNING" not in caplog.text
    assert onnx.load(tmp_path / "exported/network.onnx")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize("wrong", [lambda logits: logits + 1e-3, lambda logits: -logits, lambda logits: logits / 0])
def test_networks_that_differ_are_not_kept(run, monkeypatch, tmp_path, wrong):
    load = onnx.load
    monkeypatch.setattr(onnx, "load", lambda path, _: lambda images: wrong(load(path)(images)))
    with pytest.raises(UserError, match="differs from the original"):
        export(run, [f"output={tmp_path}/network.onnx"])
    assert not list(tmp_path.iterdir())


def test_bad_settings(run, command, monkeypatch, tmp_path):
    tmp_path.joinpath("folder.onnx").mkdir()
    tmp_path.joinpath("mine").mkdir()
    tmp_path.joinpath("mine/README.md").write_text("mine")
    tmp_path.joinpath("hub").mkdir()
    tmp_path.joinpath("hub/model.safetensors").touch()
    for pipe in ("pipe", "hub/config.json"):
        os.mkfifo(tmp_path / pipe)
    for settings, message in {
        "format=onx": "format=onx does not exist. Did you mean onnx?",
        "images=0": "images=0 is out of range: it must be at least 1.",
        "output=folder.onnx": "folder.onnx cannot be written: it is not a regular file",
        "output=pipe": "pipe cannot be written: it is not a regular file",
        "format=hub output=pipe": "pipe cannot be written: it is not a regular file",
        "format=hub output=hub": "config.json cannot be written: it is not a regular file",
        "format=hub output=mine": "mine is a folder with other files",
        "output=/dev/null/x.onnx": "output=/dev/null/x.onnx cannot be written (",
        "data.root=a": "data.root",
    }.items():
        status, _, err = command(str(run), *settings.split(), main=main)
        assert (status, message in err) == (1, True), err
    assert tmp_path.joinpath("mine/README.md").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "cifarnet.formats.onnx")
    error = command(str(run), main=main)[2]
    assert "onnxruntime" in error
    assert "pip install 'cifarnet[export]'" in error


def test_random_pixels_without_the_runs_images(changed, command, tmp_path):
    def alter(checkpoint):
        checkpoint["hyper_parameters"]["data"] = {"_target_": "cifarnet.data.folder.ImageFolder", "root": str(tmp_path)}

    run = changed(alter)
    status, out, err = command(str(run), f"output={tmp_path}/network.onnx", "images=20", main=main)
    assert status == 0, err
    assert "No test images for the comparison: " in out
    assert "Add data.root=…" in out
    assert "network.onnx: the same predictions on 20 random images" in out
    status, _, err = command(str(run), "data=folder", "data.root=/neither", main=main)
    assert (status, "/neither" in err) == (1, True), err
    shared = export(run, ["format=hub", f"output={tmp_path}/shared", "images=20"])
    status, out, err = command(str(shared), f"output={tmp_path}/again.onnx", main=main)
    assert (status, "shared does not specify its data." in out) == (0, True), err


@pytest.mark.parametrize("section", ["model", "data"])
def test_altered_checkpoints_run_no_code(changed, command, section):
    def alter(checkpoint):
        checkpoint["hyper_parameters"][section]["_target_"] = "os.system"

    status, _, err = command(str(changed(alter)), main=main)
    assert status == 1
    assert f"names the class os.system, which is not part of cifarnet.{section}" in err.replace("models", "model")


def test_shared_folder_can_be_loaded(run, images, command, tmp_path):
    folder = export(run, ["format=hub", f"output={tmp_path}/shared"])
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    original, shared = cifarnet.load(run), cifarnet.load(folder)
    assert torch.equal(logits(shared.network, images), logits(original.network, images))
    assert (shared.class_names, shared.tested) == (original.class_names, original.tested)
    for name in ("image_size", "epoch", "model", "channels_last"):
        assert getattr(shared.checkpoint, name) == getattr(original.checkpoint, name)
    assert shared.predict(images) == original.predict(images)
    evaluated = evaluate(folder, ["data=synthetic", "data.test_size=60", "corruptions=false", "data.train_size=300"])
    assert evaluated["test"]["images"] == 60
    with pytest.raises(UserError, match=r"does not specify its data\. Choose data="):
        evaluate(folder)
    assert Path(folder / "model.safetensors").stat().st_mode == Path(folder / "README.md").stat().st_mode
    with pytest.raises(UserError, match=r"no temperature was fitted .*python -m cifarnet\.evaluate .* data=…"):
        cifarnet.load(shutil.copytree(folder, tmp_path / "moved")).temperature("evaluation")


def test_shared_temperature(run, tmp_path):
    trained = shutil.copytree(run, tmp_path / "run")
    measured = evaluate(trained, ["corruptions=false"])
    shared = cifarnet.load(export(trained, ["format=hub", f"output={tmp_path}/shared"]))
    assert shared.temperature("evaluation") == measured["temperature"] != 1
    again = export(tmp_path / "shared", ["format=hub", f"output={tmp_path}/again", "data=synthetic"])
    assert cifarnet.load(again).temperature("evaluation") == measured["temperature"]
    with pytest.raises(UserError, match=r"no temperature was fitted .* with tta=none.* data=…"):
        shared.temperature("evaluation", tta="none")
    other = evaluate(tmp_path / "shared", ["data=synthetic", "data.train_size=200", "corruptions=false", "tta=none"])
    assert shared.temperature("evaluation", tta="none") == other["temperature"]
    assert shared.temperature("evaluation") == measured["temperature"]
    settings = json.loads((tmp_path / "shared/config.json").read_text())
    for wrong in ([1], 3, "x", {"tta": "mirror"}, {"tta": "mirror", "temperature": "1"}):
        (tmp_path / "shared/config.json").write_text(json.dumps(settings | {"evaluation": wrong}))
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            shared.temperature("evaluation")
    (tmp_path / "shared/config.json").write_text(
        json.dumps(settings | {"evaluation": {"tta": "mirror", "temperature": -1.0}})
    )
    with pytest.raises(UserError, match="temperature=-1"):
        shared.temperature("evaluation")


def test_card_has_the_results(run, tmp_path):
    card = export(run, ["format=hub", f"output={tmp_path}/hub"]).joinpath("README.md").read_text()
    assert f"test accuracy: {record(run)['test_accuracy']:.0%}" in card  # 50 images
    assert "95% interval" in card
    assert "SpeedNet" in card
    assert "Synthetic, 270 training and 30 validation images" in card
    (result,) = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == record(run)["test_accuracy_one_view"]
    assert result["dataset"]["name"] == "Synthetic"
    measured = evaluate(run, ["corruptions=false"])
    card = export(run, ["format=hub", f"output={tmp_path}/hub"]).joinpath("README.md").read_text()
    assert f"Brier score: {measured['test']['brier']:.4f}" in card
    assert EVALUATED in card


def test_card_has_no_paths_and_no_passwords_of_the_machine_that_trained():
    overrides = ["+experiment=baseline", "data.root=/home/me/pictures", "ckpt_path=C:\\me\\last.ckpt", "logger=csv"]
    expected = ["+experiment=baseline", "data.root=…", "ckpt_path=…", "logger=csv"]
    overrides += ["+logger.comet.api_key=secret", "+logger={_target_: mine.Logger, password: secret}"]
    expected += ["logger.comet.api_key=…", "logger=…"]
    assert [hub.without_path(override) for override in overrides] == expected


def test_card_has_no_evaluation_of_other_images_or_weights(run, tmp_path):
    def card_of(copy, **changed):
        file = copy / "evaluation/metrics.json"
        written = json.loads(file.read_text()) | changed
        file.write_text(json.dumps(written))
        return hub.card(cifarnet.load(copy))

    evaluate(run, ["corruptions=false"])
    copy = shutil.copytree(run, tmp_path / "copy")
    assert EVALUATED in card_of(copy)
    assert "Synthetic, tta=mirror, precision 32-true" in card_of(copy)
    data = json.loads((copy / "evaluation/metrics.json").read_text())["data"]
    assert EVALUATED not in card_of(copy, data=data | {"sha256": "other"})
    assert EVALUATED not in card_of(copy, data=data, finished="2000-01-01T00:00:00+00:00")
    assert EVALUATED not in card_of(copy, finished="9000-01-01T00:00:00+00:00", checkpoint="last.ckpt")


@pytest.mark.parametrize("changed", [{"partial": "limit_test_batches=1"}, {"tested_step": 1}])
def test_record_of_a_partial_test_or_of_other_weights(run, tmp_path, changed):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "metrics.json").write_text(json.dumps(record(run) | changed))
    assert cifarnet.load(run).record()
    assert cifarnet.load(copy).record() is None


def test_links_out_of_the_run_are_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "exported", ignore_errors=True)
    (tmp_path / "mine").mkdir()
    (copy / "exported").mkdir()
    (copy / "exported/hub").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link to a place outside"):
        export(copy, ["format=hub"])
    assert not list((tmp_path / "mine").iterdir())


def test_shared_folder_as_a_dot(run, tmp_path, monkeypatch):
    folder = export(run, ["format=hub", f"output={tmp_path}/mine-v1"])
    monkeypatch.chdir(folder)
    assert export(".", ["data=synthetic", "data.test_size=10"]) == tmp_path / "mine-v1_exported/network.onnx"


def test_card_without_a_record(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes((run / "checkpoints/best.ckpt").read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps(record(run) | {"tested_epoch": 7}))
    card = export(tmp_path, ["format=hub"]).joinpath("README.md").read_text()
    assert "the record of the run was not available" in card
    for damaged in (json.dumps(record(run) | {"hardware": 3}), "{}"):
        (tmp_path / "metrics.json").write_text(damaged)
        with pytest.raises(UserError, match=r"metrics\.json cannot be read"):
            export(tmp_path)


def test_class_names_stay_inside_code_blocks_of_the_card(changed):
    def alter(checkpoint):
        names = checkpoint["hyper_parameters"]["class_names"]
        names[:2] = ["<script>alert(1)</script>", "\x1b[2J```\n# [hello](http://example.org)"]

    card = hub.card(cifarnet.load(changed(alter)))
    fences = [line.startswith("```") for line in card.splitlines()]
    outside = "\n".join(line for place, line in enumerate(card.splitlines()) if sum(fences[:place]) % 2 == 0)
    assert "<script>" in card
    assert "<script>" not in outside
    assert "example.org" not in outside
    assert "\x1b" not in card


@pytest.mark.parametrize("target", ["os.system", "torch.load", "cifarnet.evaluate.evaluate", 3, None])
def test_altered_shared_folder_runs_no_code(run, tmp_path, target):
    folder = export(run, ["format=hub", f"output={tmp_path}/shared"])
    config = json.loads((folder / "config.json").read_text())
    config["model"]["_target_"] = target
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names the class"):
        cifarnet.load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", r"config\.json cannot be read"),
        ("[]", "is not a readable cifarnet checkpoint"),
        ({"model": 3}, "is not a readable cifarnet checkpoint"),
        ({"image_size": "x"}, "image_size=x"),
        ({"cifarnet": "99.0"}, "was written by cifarnet 99.0"),
        ({"class_names": ["a", "b"]}, "do not fit the network"),
    ],
)
def test_damaged_shared_folder(run, tmp_path, settings, message):
    folder = export(run, ["format=hub", f"output={tmp_path}/shared"])
    file = folder / "config.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        cifarnet.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read: .* Use another checkpoint\."):
        cifarnet.load(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files' sizes are those of POSIX")
@pytest.mark.parametrize("form", ["torch_export", "hub", "onnx", "onnx_int8"])
def test_disk_that_is_full(run, tmp_path, form):
    """A limit of the size of files fails as a full disk does. torch's own writer would end the process."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    target = tmp_path / "folder/exported"
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"output={target} cannot be written \(File too large\)"):
            export(run, [f"format={form}", f"output={target}", "images=2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(target.parent.iterdir()) == []
