import subprocess
import sys

import numpy as np
import torch

from cifarnet.evaluation import figures

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_reliability_draws_the_gaps():
    empty = {"from": 0, "to": 0.5, "images": 0, "confidence": float("nan"), "accuracy": float("nan")}
    filled = {"from": 0.5, "to": 1, "images": 4, "confidence": 0.9, "accuracy": 0.75}
    figure = figures.reliability({"as trained": [empty, filled], "scaled": [empty, filled]})
    assert [axis.get_title() for axis in figure.axes[:2]] == ["as trained", "scaled"]
    gaps = figure.axes[0].collections[0].get_segments()
    assert [gap.tolist() for gap in gaps] == [[[0.9, 0.9], [0.9, 0.75]]]
    assert [bar.get_height() for bar in figure.axes[2].patches] == [0, 1]


def test_robustness_ends_in_the_mean():
    figure = figures.robustness({"fog": [0.9, 0.7], "snow": [0.8, 0.2]}, "title")
    (axis,) = figure.axes
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.9, 0.7, 0.8], [0.8, 0.2, 0.5]])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["severity 1", "severity 2", "mean"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fog", "snow"]


def test_severities_are_columns():
    (axis,) = figures.severities({"fog": IMAGES[:2], "snow": IMAGES[2:4]}).axes
    assert [text.get_text() for text in axis.texts[:4]] == ["fog 1", "fog 2", "snow 1", "snow 2"]
    for image, drawn in zip(IMAGES[:4], axis.images, strict=True):
        assert torch.equal(torch.from_numpy(drawn.get_array()), image.permute(1, 2, 0))
    left, _, bottom, _ = np.array([drawn.get_extent() for drawn in axis.images]).T
    assert left[0] == left[2] < left[1] == left[3]
    assert bottom[0] == bottom[1] < bottom[2] == bottom[3]


def test_drawing_needs_no_torch():
    program = "import sys; import cifarnet.evaluation.figures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
