import base64
import re

import pytest
from jinja2 import UndefinedError

from cifarnet.evaluation import report

TEST = {"images": 2000, "accuracy": 0.91, "interval": [0.9, 0.92], "top2_accuracy": 0.97}
TEST |= {"cross_entropy": 0.25, "calibration_error": 0.03, "brier": 0.125}
NAN = float("nan")
RECORD = {
    "checkpoint": "runs/a/checkpoints/best.ckpt",
    "network": "CNN",
    "parameters": 1_234_567,
    "epoch": 4,
    "tta": "mirror",
    "tta_share": 0.25,
    "precision": "bf16-mixed",
    "data": {"source": "Synthetic", "classes": 3, "train": 9000, "val": 1000, "test": 2000, "sha256": "abc"},
    "hardware": {"device": "cpu", "name": "Some CPU", "threads": 2, "system": "Linux"},
    "versions": {"python": "3.11", "torch": "2.15.0"},
    "training_settings": {"optimizer.lr": "0.05", "model.widths": "[4, 4]"},
    "command": "python -m cifarnet.evaluate runs/a",
    "finished": "2026-11-24T12:00:00+00:00",
    "test": TEST,
    "test_accuracy_one_view": 0.905,
    "val": {**TEST, "images": 1000, "accuracy": 0.93},
    "temperature": 1.5,
    "test_with_temperature": {"cross_entropy": 0.2, "calibration_error": 0.01, "brier": 0.12},
    "calibration_bins": [{}] * 15,
    "classes": [
        {"name": "disc", "images": 1500, "accuracy": 0.9, "interval": [0.88, 0.92]},
        {"name": "ring", "images": 500, "accuracy": 0.94, "interval": [0.92, 0.96]},
        {"name": "none", "images": 0, "accuracy": NAN, "interval": [NAN, NAN]},
    ],
    "corruptions": None,
    "cifar10_c": None,
    "cifar10_1": None,
    "cifar10h": None,
}
FIGURES = {name: (b"\x89PNG light " + name, b"\x89PNG dark " + name) for name in (b"confusion", b"reliability")}
FIGURES = {name.decode(): pngs for name, pngs in FIGURES.items()}


def words(html: str) -> str:
    return " ".join(re.sub(r"<style>.*</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def test_page_says_what_was_found():
    html = report.render(RECORD, FIGURES)
    page = words(html)
    assert "<h1>91.00%</h1>" in html
    assert "<title>91.00%: runs/a/checkpoints/best.ckpt</title>" in html
    for part in (
        "CNN, 1,234,567 parameters, after epoch 4; Synthetic",
        "2,000 images; 95% interval 90.00% to 92.00% (Wilson)",
        "without augmentation 90.50% (test-time, tta=mirror)",
        "cross-entropy 0.2500 (0.2000 with temperature 1.500)",
        "hardest classes disc 90.0%, ring 94.0%",
        "into 15 equally wide bins",
        "The temperature, 1.500, divides the logits; it minimises the cross-entropy of 1,000 validation images",
        "disc 1,500 90.0% 88.0% to 92.0%",
        "Synthetic: 9,000 / 1,000 / 2,000 images to train / validate / test; sha256 abc",
        "bf16-mixed, tta=mirror tta_share=0.25",
        "Training settings optimizer.lr 0.05 model.widths [4, 4]",
        "cpu: Some CPU, 2 threads, Linux",
        "python 3.11, torch 2.15.0",
        "date 2026-11-24T12:00:00+00:00",
    ):
        assert part in page
    assert "nan" not in page
    for absent in ("Robustness", "CIFAR-10-C", "The most confident mistakes", "none are left"):
        assert absent not in page


def test_figures_are_in_the_page():
    html = report.render(RECORD, FIGURES)
    for number, place in enumerate(["src", r'media="\(prefers-color-scheme: dark\)" srcset']):
        codes = re.findall(rf'{place}="data:image/png;base64,([^"]+)"', html)
        assert [base64.b64decode(code) for code in codes] == [pngs[number] for pngs in FIGURES.values()]
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)  # it opens offline


def test_sections_are_there_when_they_were_measured():
    measured = {"corruptions": {"mean": 0.7}, "cifar10_c": {"mean": 0.6, "averaged": ["fog", "snow"]}}
    measured |= {"cifar10_1": {"v6": TEST}, "cifar10h": {"entropy": 0.2, "cross_entropy": 0.4}}
    page = words(
        report.render({**RECORD, **measured}, FIGURES | dict.fromkeys(["corruptions", "cifar10_c"], (b"", b"")))
    )
    for part in (
        "under corruption 70.00% (mean; not to be compared with CIFAR-10-C)",
        "the figures are not to be compared with those on CIFAR-10-C.",
        "CIFAR-10-C 60.00% (mean of 2 corruptions)",
        "Mean of 2 corruptions, without gaussian_blur, saturate, spatter, speckle_noise, as published.",
        "CIFAR-10.1 v6 91.00%",
        "people's labels 0.4000 (the least possible: 0.2000)",
    ):
        assert part in page.replace("&#39;", "'")


def test_runs_without_validation_say_so():
    page = words(report.render({**RECORD, "val": None, "temperature": None, "test_with_temperature": None}, FIGURES))
    assert "validation accuracy none (trained on all images)" in page
    assert "none are left to fit a temperature on" in page
    assert "divides the logits" not in page


def test_names_from_strangers_do_nothing_on_the_page():
    harmful = '"><script>a()</script><img src=x onerror=b()>{{ 7 * 7 }}'
    hardware, data = ({**RECORD[key], name: harmful} for key, name in [("hardware", "name"), ("data", "source")])
    named = {key: harmful for key in ("network", "checkpoint", "command", "precision", "tta", "finished")}
    classes = [{**row, "name": harmful} for row in RECORD["classes"]]
    versions = settings = {harmful: harmful}
    more = {"training_settings": settings, "classes": classes, "hardware": hardware, "data": data, "versions": versions}
    html = report.render({**RECORD, **named, **more}, {})
    for tag in ("<script", "<img", "49"):
        assert tag not in html
    assert html.count("&lt;script&gt;") >= len(named) + len(classes) + 4


def test_a_record_that_lacks_something_makes_no_page():
    with pytest.raises((KeyError, UndefinedError), match="finished"):
        report.render({key: value for key, value in RECORD.items() if key != "finished"}, FIGURES)
