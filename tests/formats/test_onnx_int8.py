"""format=onnx_int8: a file has the accuracy that it states; a network that loses too much accuracy leaves no file."""

import math
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import cifarnet
from cifarnet.cli import compose
from cifarnet.errors import UserError
from cifarnet.export import export, main
from cifarnet.inference import test_images
from cifarnet.inference.trained import Trained
from cifarnet.train import train
from conftest import LEARNS, alter

INT8 = "format=onnx_int8"
ANY_FALL = "tolerance=100"


def answers(session: onnxruntime.InferenceSession, images: torch.Tensor, batch_size: int) -> np.ndarray:
    batches = images.split(batch_size)
    return np.concatenate([session.run(["logits"], {"images": batch.numpy()})[0] for batch in batches])


def all_test_images(classifier: Trained) -> tuple[torch.Tensor, list[int]]:
    return test_images.sample(test_images.load("export", [], classifier.checkpoint, []).source.test, 60)


def num_correct(logits: np.ndarray, labels: list[int]) -> int:
    return sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))


def test_file_has_the_accuracy_that_it_states(run, command, caplog, tmp_path):
    status, out, err = command(str(run), INT8, ANY_FALL, main=main)
    assert status == 0, err
    assert "WARNING" not in caplog.text
    session = onnxruntime.InferenceSession(run / "exported/network_int8.onnx")
    classifier = cifarnet.load(run)
    images, labels = all_test_images(classifier)
    logits = answers(session, images, 60)
    for batch_size in (1, 7):
        np.testing.assert_allclose(answers(session, images, batch_size), logits, rtol=0, atol=1e-5)
    correct = num_correct(logits, labels)
    with torch.no_grad():
        correct_before = num_correct(classifier.network(images).numpy(), labels)
    change = 100 * (correct - correct_before) / 60
    assert "8-bit integers, calibrated on 270 training images." in out
    assert f"changes the test accuracy by {change:+.2f} points (95% interval" in out
    for name, number in {"float32": correct_before, "int8": correct}.items():
        assert re.search(rf"  {name} +{number / 60:.0%} test accuracy, \d+\.\d\d MB, [\d,]+ images/s\n", out)
    original = onnxruntime.InferenceSession(export(run, [f"output={tmp_path}/network.onnx"]))
    facts, expected = (found.get_modelmeta().custom_metadata_map for found in (session, original))
    accuracy = {"test_accuracy", "test_images"}  # of the float32 network
    assert accuracy <= expected.keys()
    assert accuracy.isdisjoint(facts)
    assert {name: facts.get(name) for name in expected.keys() - accuracy}.items() <= expected.items()
    assert original.get_inputs()[0].type == session.get_inputs()[0].type == "tensor(uint8)"


def test_weights_are_integers(run):
    model = onnx.load(export(run, [INT8, ANY_FALL]))
    stored = [part for part in model.graph.initializer if part.data_type == onnx.TensorProto.INT8]
    expected = sum(weight.numel() for weight in cifarnet.load(run).network.parameters() if weight.ndim > 1)
    assert sum(math.prod(part.dims) for part in stored) >= expected


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A run whose channels have very different ranges, which one scale of 8 bits cannot represent.

    The weights of the second convolution cancel the factors, so the network itself computes the same function as
    without them (Nagel et al., 2019, https://arxiv.org/abs/1906.04721).
    """
    folder = tmp_path_factory.mktemp("uneven")
    base = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "module.tta"))]
    settings = ["model.widths=[8,8,8,8]", "model.hidden=32", "optimizer=adamw", "trainer.max_epochs=3"]
    train(compose("train", [*base, *settings, "data.batch_size=16", f"output_dir={folder}/run"]))
    shutil.copytree(folder / "run", folder / "uneven")

    def scale(content):
        weights, factors = content["state_dict"], 10.0 ** torch.arange(8)
        weights["network.features.0.weight"] *= factors[:, None, None, None]
        weights["network.features.0.bias"] *= factors
        weights["network.features.2.weight"] /= factors[:, None, None]

    alter(folder / "uneven/checkpoints/best.ckpt", scale)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [cifarnet.load(folder / name).network(images) for name in ("run", "uneven")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
    return folder / "uneven"


def test_nothing_is_written_if_the_accuracy_falls_too_much(uneven, tmp_path):
    target = f"output={tmp_path}/folder/network.onnx"
    message = r"by -\d+\.\d\d points \(95% interval .*, 60 test images\), but tolerance=0\.5 .* or format=onnx\."
    with pytest.raises(UserError, match=message):
        export(uneven, [INT8, target])
    assert list((tmp_path / "folder").iterdir()) == []

    session = onnxruntime.InferenceSession(export(uneven, [INT8, target, ANY_FALL]))
    classifier = cifarnet.load(uneven)
    images, labels = all_test_images(classifier)
    with torch.no_grad():
        before = num_correct(classifier.network(images).numpy(), labels)
    fall = (before - num_correct(answers(session, images, 60), labels)) / 60 * 100
    export(uneven, [INT8, target, f"tolerance={fall + 1e-9}"])
    with pytest.raises(UserError, match="tolerance"):
        export(uneven, [INT8, target, f"tolerance={fall - 1e-9}"])


def test_images_are_required(changed, command, tmp_path):
    def leave_out_the_folder(content):
        content["hyper_parameters"]["data"] = {"_target_": "cifarnet.data.folder.ImageFolder", "root": str(tmp_path)}

    path = changed(leave_out_the_folder)
    status, _, err = command(str(path), INT8, main=main)
    assert status == 1
    assert "format=onnx_int8 needs training and test images." in err
    assert "Add data.root=…" in err
