import subprocess
import sys

import numpy as np
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text

from cifarnet.inference import figures

NAMES = ["cat", "dog", "owl"]
IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def captions(figure):
    return [(text.get_text(), to_hex(text.get_color())) for text in figure.axes[0].texts[: len(figure.axes[0].images)]]


def test_mistakes_among_predictions_are_red():
    images, labels, predicted = IMAGES[[0, 1, 2] * 3], torch.tensor([0, 1, 2] * 3), torch.tensor([0, 2, 2] * 3)
    figure = figures.predictions(images, labels, predicted, NAMES)
    assert captions(figure) == 3 * [
        ("cat", figures.RIGHT),
        ("✗ owl\n(is dog)", figures.WRONG),
        ("owl", figures.RIGHT),
    ]
    assert "6 of 9 right" in figure.axes[0].texts[-1].get_text()
    shown = [image.get_array() for image in figure.axes[0].images]
    places = [image.get_extent() for image in figure.axes[0].images]  # left, right, bottom, top
    assert places[0][2:] == places[7][2:]
    assert places[0][1] < places[1][0]
    assert places[8][:2] == places[0][:2]  # the ninth image begins a row
    assert places[8][3] > places[0][2]
    assert all((IMAGES[i].permute(1, 2, 0).numpy() == shown[i]).all() for i in range(3))


def test_mistakes_show_their_confidence():
    rows = [{"index": 2, "class": "dog", "predicted": "cat", "confidence": 0.987}]
    figure = figures.mistakes(IMAGES, rows, "dog → cat", 6)
    assert (figure.axes[0].images[0].get_array() == IMAGES[2].permute(1, 2, 0).numpy()).all()
    assert figure.axes[0].texts[-1].get_text() == "dog → cat"
    assert captions(figure) == [("cat 98.7%\n(is dog)", figures.WRONG)]


def test_confusion_is_in_percent_of_the_true_class():
    figure = figures.confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]]), NAMES)
    (axis,) = figure.axes
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0, 1]]
    written = {text.get_position(): text.get_text() for text in axis.texts}  # (column, row)
    assert written == {(0, 0): "75", (1, 0): "25", (2, 2): "100"}


def test_a_figure_becomes_pixels():
    pixels = figures.as_image(figures.predictions(IMAGES, torch.zeros(5).long(), torch.zeros(5).long(), NAMES))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 0


def test_names_are_drawn_as_they_are():
    names, none = ["$\\bad{$", "$x_1$", "caf\udce9"], torch.zeros(3, dtype=torch.long)
    ranked = [(name, 0.3) for name in names]
    rows = [{"index": i, "class": name, "predicted": name, "confidence": 0.9} for i, name in enumerate(names)]
    explanation = figures.explanation(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32)), ranked, "$\\frac$ <b>.png")
    assert explanation.get_suptitle() == "$\\frac$ <b>.png"
    predictions = figures.predictions(IMAGES[:3], torch.arange(3), none, names)
    confusion = figures.confusion(torch.ones(3, 3, dtype=torch.long), names)
    for figure in (explanation, predictions, confusion, figures.mistakes(IMAGES[:3], rows, names[2], 5)):
        assert figures.as_image(figure).any()
        texts = figure.findobj(Text)
        assert any("caf\\udce9" in text.get_text() for text in texts)
        assert any("$x_1$" in text.get_text() for text in texts)
        assert not any(text.get_parse_math() for text in texts)


def test_drawing_needs_no_torch():
    program = "import sys; import cifarnet.inference.figures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_confusion_of_many_classes_is_readable():
    for count, step in [(21, 1), (100, 1), (400, 4)]:
        figure = figures.confusion(torch.eye(count, dtype=torch.long), [f"class number {i}" for i in range(count)])
        assert max(figure.get_size_inches() * figure.dpi) < 2000  # pixels
        (axis,) = figure.axes
        assert not axis.texts
        names = axis.get_xticklabels()
        assert [name.get_text() for name in names] == [f"class number {i}" for i in range(0, count, step)]
        points = 72 * figure.get_size_inches()[0] * axis.get_position().width / len(names)
        assert 5 <= names[0].get_fontsize() <= points  # names do not overlap


def test_long_titles_fit():
    rows = [{"index": 0, "class": "a", "predicted": "b", "confidence": 0.9}]
    figure = figures.mistakes(IMAGES, rows, "spaghetti_carbonara_with_bacon → macaroni_and_cheese: 123    " * 2, 6)
    figures.as_image(figure)
    box = figure.axes[0].texts[-1].get_window_extent()
    assert 0 < box.x0 < box.x1 < figure.get_size_inches()[0] * figure.dpi


def test_long_names_do_not_overlap():
    names = ["spaghetti_carbonara_with_bacon", "cat"]
    figure = figures.predictions(IMAGES[:2], torch.tensor([0, 1]), torch.tensor([1, 1]), names)
    figures.as_image(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts[:2]]
    assert boxes[0].x1 < boxes[1].x0
    assert boxes[0].width < 1.35 * figure.dpi
