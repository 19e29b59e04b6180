from dataclasses import replace

import pytest
import torch
from test_report import EVALUATION, TEST, words

from cifarnet.evaluation import members, metrics, report

LOGITS = [torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
RUNS = [{"checkpoint": f"/runs/{name}/checkpoints/best.ckpt", **TEST, "accuracy": 0.9} for name in ("0", "1")]
MEMBERS = {
    "runs": RUNS,
    "mean": {"accuracy": 0.9, "cross_entropy": 0.3, "calibration_error": 0.04, "brier": 0.2},
    "deviation": {"accuracy": 0.001, "cross_entropy": 0.01, "calibration_error": 0.002, "brier": 0.03},
    "disagreement": {"images": 2000, "share": 0.0625, "interval": [0.05, 0.07]},
    "soup": {**TEST, "accuracy": 0.1},
}
ENSEMBLE = replace(EVALUATION, members=MEMBERS)


def test_disagreement_is_counted_for_each_pair():
    different = pairs = 0
    for i in range(3):
        for j in range(i):
            for first, second in zip(LOGITS[i].tolist(), LOGITS[j].tolist(), strict=True):
                pairs += 1
                different += first.index(max(first)) != second.index(max(second))
    found = members.disagreement(LOGITS)
    assert found["share"] == pytest.approx(different / pairs)
    assert found["images"] == 50
    low, high = found["interval"]
    assert 0 < low < found["share"] < high < 1
    assert members.disagreement([LOGITS[0], 2 * LOGITS[0]])["share"] == 0


def test_the_interval_of_two_networks_is_that_of_a_proportion():
    different = int((LOGITS[0].argmax(1) != LOGITS[1].argmax(1)).sum())
    assert members.disagreement(LOGITS[:2])["interval"] == metrics.proportion(different, 50)["interval"]


def test_table():
    columns = members.table(MEMBERS, TEST)
    assert columns["run"] == ["mean ± standard deviation", "ensemble", "soup", "0", "1"]
    assert columns["accuracy"] == ["90.00% ± 0.10%", "91.00%", "10.00%", "90.00%", "90.00%"]
    assert columns["cross-entropy"] == ["0.3000 ± 0.0100", *["0.2500"] * 4]
    assert columns["calibration error"] == ["4.00% ± 0.20%", *["3.00%"] * 4]
    assert columns["Brier score"] == ["0.2000 ± 0.0300", *["0.1250"] * 4]
    assert columns["95% interval (accuracy)"] == ["", *["90.00% to 92.00%"] * 4]
    assert members.table(MEMBERS | {"soup": None}, TEST)["run"][1:] == ["ensemble", "0", "1"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x/checkpoints/best.ckpt", "a/y/checkpoints/last.ckpt"], ["x", "y"]),
        (["a/checkpoints/best.ckpt", "a/checkpoints/last.ckpt"], ["best.ckpt", "last.ckpt"]),
        (["trained/speedrun", "trained/baseline"], ["speedrun", "baseline"]),
        (["a/x/checkpoints/best.ckpt", "lone.ckpt"], ["a/x", "lone.ckpt"]),
        (
            ["x/checkpoints/best.ckpt", "x/checkpoints/last.ckpt", "y/checkpoints/best.ckpt"],
            ["x/checkpoints/best.ckpt", "x/checkpoints/last.ckpt", "y/checkpoints/best.ckpt"],
        ),
        (["ensemble/checkpoints/best.ckpt", "soup/checkpoints/best.ckpt"], ["ensemble", "soup"]),
    ],
)
def test_names_of_runs(paths, names):
    runs = [{**RUNS[0], "checkpoint": path, "accuracy": number / 10} for number, path in enumerate(paths)]
    columns = members.table(MEMBERS | {"runs": runs}, TEST)
    assert columns["run"] == ["mean ± standard deviation", "ensemble", "soup", *names]
    assert columns["accuracy"][3:] == [f"{number / 10:.2%}" for number in range(len(paths))]


def test_page_has_the_runs():
    page = words(report.render(ENSEMBLE, {}))
    for part in (
        "mean ± standard deviation 90.00% ± 0.10% 0.3000 ± 0.0100 4.00% ± 0.20% 0.2000 ± 0.0300",
        "ensemble 91.00% 90.00% to 92.00% 0.2500 3.00% 0.1250",
        "soup 10.00%",
        "disagreement 6.25% (95% interval 5.00% to 7.00%, 2,000 images), mean over pairs of runs",
        "means of the probabilities of its 2 runs",
        "recomputed on 9,000 training images",
        "/runs/0/checkpoints/best.ckpt, /runs/1/checkpoints/best.ckpt",
    ):
        assert part in page
    assert "after epoch" not in page
    without = words(report.render(replace(ENSEMBLE, members=MEMBERS | {"soup": None}), {}))
    assert "soup" not in without
    assert "The runs and their ensemble" not in words(report.render(EVALUATION, {}))


def test_paths_are_escaped():
    runs = [{**run, "checkpoint": f"<script>{run['checkpoint']}"} for run in RUNS]
    assert "<script" not in report.render(replace(ENSEMBLE, members=MEMBERS | {"runs": runs}), {})
