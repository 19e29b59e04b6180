import base64
import re
from dataclasses import replace

import pytest
from jinja2 import UndefinedError

from cifarnet.evaluation import report
from cifarnet.records.evaluation import Evaluation

TEST = {"images": 2000, "accuracy": 0.91, "interval": [0.9, 0.92], "top2_accuracy": 0.97}
TEST |= {"cross_entropy": 0.25, "calibration_error": 0.03, "brier": 0.125}
NAN = float("nan")


def class_row(name, images, accuracy, interval, predicted, precision):
    row = {"name": name, "images": images, "accuracy": accuracy, "interval": interval, "predicted": predicted}
    row |= {"precision": precision, "precision_interval": [precision - 0.03, precision + 0.03]}
    return row | {"f1": precision - 0.01, "f1_interval": [precision - 0.04, precision + 0.02]}


EVALUATION = Evaluation(
    checkpoint="runs/a/checkpoints/best.ckpt",
    network="CNN",
    parameters=1_234_567,
    epoch=4,
    class_names=["disc", "ring", "none"],
    tta="mirror",
    tta_share=0.25,
    precision="bf16-mixed",
    data={"source": "Synthetic", "classes": 3, "train": 9000, "val": 1000, "test": 2000, "sha256": "abc"},
    training_settings={"optimizer.lr": "0.05", "model.widths": "[4, 4]"},
    hardware={"device": "cpu", "name": "Some CPU", "threads": 2, "system": "Linux"},
    versions={"python": "3.11", "torch": "2.15.0"},
    git_commit=None,
    command="python -m cifarnet.evaluate runs/a",
    config={},
    test=TEST,
    test_accuracy_one_view=0.905,
    val={**TEST, "images": 1000, "accuracy": 0.93},
    temperature=1.5,
    test_with_temperature={"cross_entropy": 0.2, "calibration_error": 0.01, "brier": 0.12},
    calibration_bins=[{}] * 15,
    classes=[
        class_row("disc", 1500, 0.9, [0.88, 0.92], 1400, 0.95),
        class_row("ring", 500, 0.94, [0.92, 0.96], 600, 0.85),
        class_row("none", 0, NAN, [NAN, NAN], 0, NAN),
    ],
    macro_f1=0.8765,
    confusion=[],
    mistakes=[],
    cifar10h=None,
    corruptions=None,
    cifar10_c=None,
    cifar10_1=None,
    finished="2026-11-24T12:00:00+00:00",
)


@pytest.fixture
def figures(tmp_path):
    """Return paths of figures with these names."""

    def make(*names):
        for name in names:
            (tmp_path / f"{name}.png").write_bytes(b"\x89PNG " + name.encode())
        return {name: tmp_path / f"{name}.png" for name in names}

    return make


def words(html: str) -> str:
    return " ".join(re.sub(r"<style>.*</style>|<[^>]+>", " ", html, flags=re.DOTALL).split()).replace("&#39;", "'")


def test_page_has_all_results(figures):
    html = report.render(EVALUATION, figures("confusion", "reliability"))
    page = words(html)
    assert "<h1>Evaluation of runs/a/checkpoints/best.ckpt</h1>" in html
    assert "<title>runs/a/checkpoints/best.ckpt on Synthetic: 91.00%</title>" in html
    assert "<h1>Evaluation of baseline</h1>" in report.render(EVALUATION, {}, "baseline")
    for part in (
        "CNN, 1,234,567 parameters, after epoch 4, on Synthetic 91.00%",
        "2,000 images; 95% interval 90.00% to 92.00% (Wilson)",
        "without augmentation 90.50%",
        "cross-entropy 0.2500 (0.2000 with temperature 1.500)",
        "hardest classes disc 90.00%, ring 94.0%",
        "15 equally wide bins",
        "1,000 validation images",
        "disc 1,500 images 90.00% 88.00% to 92.00% 95.00% 92.00% to 98.00% 94.00% 91.00% to 97.00%",
        "none 0 images Training settings",
        "The macro F1, the mean over the classes, is 87.65%.",
        "Synthetic: 1,000 validation and 2,000 test images; sha256 abc",
        "bf16-mixed, tta=mirror tta_share=0.25",
        "Training settings optimizer.lr 0.05 model.widths [4, 4]",
        "cpu: Some CPU, 2 threads, Linux",
        "python 3.11, torch 2.15.0",
        "date 2026-11-24T12:00:00+00:00",
    ):
        assert part in page
    assert "nan" not in page
    for absent in ("Robustness", "CIFAR-10-C", "The most confident mistakes", "trained on all images"):
        assert absent not in page


def test_page_includes_figures_and_opens_offline(figures):
    paths = figures("confusion", "reliability")
    html = report.render(EVALUATION, paths)
    codes = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert [base64.b64decode(code) for code in codes] == [path.read_bytes() for path in paths.values()]
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)


def test_optional_sections(figures):
    evaluation = replace(
        EVALUATION,
        corruptions={"mean": 0.7},
        cifar10_c={"mean": 0.6, "averaged": ["fog", "snow"]},
        cifar10_1={"v6": TEST},
        cifar10h={"entropy": 0.2, "cross_entropy": 0.4},
    )
    page = words(report.render(evaluation, figures("corruptions", "cifar10_c")))
    for part in (
        "under corruption 70.00%",
        "not comparable with results on CIFAR-10-C.",
        "CIFAR-10-C 60.00% (mean of 2 corruptions)",
        "excludes gaussian_blur, saturate, spatter, speckle_noise.",
        "CIFAR-10.1 v6 91.00%",
        "human labels 0.4000 (lower bound 0.2000)",
    ):
        assert part in page


def test_run_without_validation(figures):
    evaluation = replace(EVALUATION, val=None, temperature=None, test_with_temperature=None)
    page = words(report.render(evaluation, figures("reliability")))
    assert "validation accuracy none (trained on all images)" in page
    assert "no validation images to fit a temperature on" in page
    assert "divides the logits" not in page


def test_checkpoint_outside_of_a_run():
    assert "Training settings" not in words(report.render(replace(EVALUATION, training_settings={}), {}))


def test_values_are_escaped():
    harmful = '"><script>a()</script><img src=x onerror=b()>{{ 7 * 7 }}'
    names = dict.fromkeys(("network", "checkpoint", "command", "precision", "tta", "finished"), harmful)
    evaluation = replace(
        EVALUATION,
        **names,
        training_settings={harmful: harmful},
        versions={harmful: harmful},
        hardware=EVALUATION.hardware | {"name": harmful},
        data=EVALUATION.data | {"source": harmful},
        classes=[row | {"name": harmful} for row in EVALUATION.classes],
    )
    html = report.render(evaluation, {})
    for tag in ("<script", "<img", "49"):
        assert tag not in html
    assert html.count("&lt;script&gt;") >= len(names) + len(EVALUATION.classes) + 4


def test_incomplete_evaluation():
    evaluation = replace(EVALUATION)
    del evaluation.finished
    with pytest.raises(UndefinedError, match="finished"):
        report.render(evaluation, {})


def test_many_classes_show_the_hardest_and_the_most_frequent_mistakes(figures):
    counts = [[0] * 30 for _ in range(30)]
    for label in range(30):
        counts[label][label], counts[label][(label + 1) % 30] = 100 - 3 * label, 3 * label
    rows = [class_row(f"c{i}", 100, 1 - 0.03 * i, [0, 1], 100, 0.5) for i in range(30)]
    evaluation = replace(
        EVALUATION,
        class_names=[row["name"] for row in rows],
        confusion=counts,
        classes=rows,
        test={**TEST, "top5_accuracy": 0.99},
    )
    html = report.render(evaluation, figures("confusion"))
    page, details = words(html), words(html[html.index("<details>") :])
    assert "top-2 accuracy 97.00% top-5 accuracy 99.00%" in page
    assert "class accuracy (recall) precision F1 c29 100 images 13% 0% to 100% 50%" in page
    assert page.index("The ten hardest classes") < page.index("macro F1") < page.index("c29 100 images")
    assert "The most frequent mistakes class predicted class images of the class c29 c0 87 87% c28 c29 84 84%" in page
    assert "c19 100 images" not in page.replace(details, "")  # only the ten hardest of 30
    assert all(f"c{i} 100 images" in details for i in range(30))
    assert "F1 by class" not in page


COVERED = {"images": 900, "accuracy": 0.99, "interval": [0.98, 0.995], "coverage": 0.9, "confidence": 0.71234}
SELECTIVE = {"aurc": 0.0123, "excess_aurc": 0.0045, "coverages": [COVERED]}


def test_selective_prediction(figures):
    html = report.render(replace(EVALUATION, selective=SELECTIVE), figures("selective"))
    page = words(html)
    assert "90% most confident 99.0% (95% interval 98.0% to 99.5%, 900 images)" in page
    assert "coverage confidence images accuracy 90.00% ≥ 0.7123 900 99.0% 98.0% to 99.5%" in page


def sets(num_classes):
    """The record of conformal prediction with sets of 0 to `num_classes` classes."""
    part = {"images": 2000, "coverage": 0.9, "interval": [0.88, 0.92], "mean_size": 1.2345}
    sizes = [100 + size for size in range(num_classes + 1)]
    part = {**part, "sizes": sizes, "classes": [part] * num_classes}
    return {"alpha": 0.05, "val_images": 1000, "sets": {"LAC": part | {"threshold": 0.5}, "APS": part}}


def test_conformal_prediction():
    page = words(report.render(replace(EVALUATION, conformal=sets(3)), {}))
    assert "conformal coverage 90.00% (95% interval 88.00% to 92.00%, 2,000 images)" in page
    assert "conformal set size 1.23 (mean; LAC, alpha=0.05)" in page
    assert "a probability of at least 95%." in page
    assert "fitted on 1,000 validation images" in page
    assert "LAC APS coverage 90.00% 88.00% to 92.00% 90.00% 88.00% to 92.00% mean number of classes 1.234" in page
    assert "images with 0 classes 100 100 images with 1 class 101 101" in page
    assert "images with 3 classes 103 103" in page
    assert "4 classes" not in page
    assert "class LAC APS disc 1,500 images 90.00% 88.00% to 92.00% 1.234 90.00%" in page
    assert "none 0 images 90.00%" not in page
    ten = replace(EVALUATION, conformal=sets(10), classes=EVALUATION.classes[:2] * 5)
    page = words(report.render(ten, {}))
    assert f"images with 4 classes 104 104 images with 5 or more classes {sum(range(105, 111))}" in page


def test_conformal_prediction_needs_validation_images():
    evaluation = replace(EVALUATION, val=None, temperature=None, test_with_temperature=None)
    assert "Conformal prediction Not measured" in words(report.render(evaluation, {}))


def test_confused_pairs(figures):
    html = report.render(EVALUATION, figures("confusion", "confused_1", "confused_2", "mistakes"))
    order = [html.index(f'class="{name}"') for name in ("confusion", "confused_1", "confused_2", "mistakes")]
    assert order == sorted(order)
    assert words(html).count("The most confused pairs of classes") == 1
