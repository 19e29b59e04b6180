import io
import subprocess
import sys
from functools import partial

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image

from cifarnet.evaluation import figures

NAMES = ["cat", "dog", "owl"]
IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def captions(figure):
    return [(text.get_text(), to_hex(text.get_color())) for text in figure.axes[0].texts[: len(figure.axes[0].images)]]


def test_mistakes_are_red_among_predictions():
    figure = figures.predictions(IMAGES[:3], torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]), NAMES, columns=2)
    assert captions(figure) == [
        ("cat", figures.RIGHT),
        ("✗ owl\n(is dog)", figures.WRONG),
        ("owl", figures.RIGHT),
    ]
    assert "2 of 3 right" in figure.axes[0].texts[-1].get_text()
    shown = [image.get_array() for image in figure.axes[0].images]
    places = [image.get_extent() for image in figure.axes[0].images]  # left, right, bottom, top
    assert places[0][2:] == places[1][2:]
    assert places[0][1] < places[1][0]
    assert places[2][:2] == places[0][:2]
    assert places[2][3] > places[0][2]
    assert all((IMAGES[i].permute(1, 2, 0).numpy() == shown[i]).all() for i in range(3))


def test_mistakes_show_how_sure_the_network_was():
    figure = figures.mistakes(IMAGES[:1], [{"class": "dog", "predicted": "cat", "confidence": 0.987}])
    assert captions(figure) == [("cat 98.7%\n(is dog)", figures.WRONG)]


def test_confusion_is_in_shares_of_the_true_class():
    figure = figures.confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]]), NAMES)
    (axis,) = figure.axes
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0, 1]]
    written = {text.get_position(): text.get_text() for text in axis.texts}  # (column, row)
    assert written == {(0, 0): "75", (1, 0): "25", (2, 2): "100"}


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
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "mean"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fog", "snow"]


def test_severities_are_columns():
    (axis,) = figures.severities({"fog": IMAGES[:2], "snow": IMAGES[2:4]}).axes
    pixels = torch.from_numpy(axis.images[0].get_array())
    assert torch.equal(pixels[12:20, 12:20], IMAGES[3].permute(1, 2, 0))  # a border of two pixels


def test_a_figure_becomes_pixels():
    pixels = figures.as_image(figures.predictions(IMAGES, torch.zeros(5).long(), torch.zeros(5).long(), NAMES))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 0


def test_drawing_needs_no_torch():
    program = "import sys; import cifarnet.evaluation.figures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dark_figures_are_dark_and_leave_no_trace():
    matrix = torch.tensor([[9, 1, 0], [0, 10, 0], [5, 0, 5]])
    before = {key: matplotlib.rcParams[key] for key in figures.DARK}
    pngs = figures.light_and_dark(partial(figures.confusion, matrix, NAMES))
    light, dark = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in pngs)
    assert light.shape == dark.shape
    assert (tuple(light[0, 0]), to_hex(dark[0, 0] / 255)) == ((255, 255, 255), figures.PAGE)
    assert light.mean() > 200
    assert dark.mean() < 90
    assert (dark.min(2) > 200).any()  # its text is light
    assert {key: matplotlib.rcParams[key] for key in figures.DARK} == before
