import html
import itertools
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cifarnet.records import figures
from cifarnet.records.tables import Group, Run

VALUES = {
    "optimizer.lr": ["0.001", "0.1", "1"],
    "model": ["cnn", "mine"],
    "model.hidden": ["128", "256"],
    "data.train_sizes": ["[24,24,28,28,32,32]", "null"],
    "data.crop_padding": ["0", "2", "4"],
}


def make(settings: dict[str, str], mean: float | None, deviation: float = 0) -> Group:
    """A group of two runs with this mean and deviation, or of a run without an accuracy."""
    values = [] if mean is None else [mean - deviation / 2**0.5, mean + deviation / 2**0.5]
    runs = [Run(Path(), {"seed": str(seed)}, numbers={"val_accuracy": value}) for seed, value in enumerate(values)]
    return Group(settings, runs or [Run(Path(), {})], "val_accuracy")


def grid(keys: list[str]) -> list[Group]:
    """A group for each combination of values, of which the last one is the best, and one that failed."""
    combinations = list(itertools.product(*(VALUES[key] for key in keys)))
    groups = [make(dict(zip(keys, c, strict=True)), 0.5 + 0.001 * i, 0.01) for i, c in enumerate(combinations)]
    return [*groups, make(groups[0].settings, None)]


def labels(figure: Figure) -> list[str]:
    return [axis.get_xlabel() for axis in figure.axes if axis.get_visible() and axis.get_xlabel()]


def drawn(axis: Axes) -> dict[str, Line2D]:
    """The points of an axis: of runs and of their means."""
    return dict(zip(["runs", "mean"], axis.lines, strict=False))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_setting_has_a_panel_with_all_runs_and_means(count, tmp_path):
    keys = list(VALUES)[:count]
    figure = figures.sweep(groups := grid(keys), keys)
    figures.save(figure, tmp_path / "sweep.png")
    assert labels(figure) == keys
    for axis in figure.axes[:count]:
        assert len(drawn(axis)["runs"].get_xdata()) == 2 * (len(groups) - 1)
        assert list(drawn(axis)["mean"].get_ydata()) == pytest.approx([group.mean for group in groups[:-1]])


@pytest.mark.parametrize(
    ("key", "scale", "x"),
    [
        ("optimizer.lr", "log", [0.001, 0.1, 1]),
        ("model.hidden", "linear", [128, 256]),
        ("model", "linear", ["cnn", "mine"]),
        ("data.train_sizes", "linear", ["[24,24,28,28,32,32]", "null"]),
    ],
)
def test_numbers_are_at_their_values_and_texts_are_categories(key, scale, x):
    [axis] = figures.sweep(grid([key]), [key]).axes
    assert axis.get_xscale() == scale
    assert list(drawn(axis)["mean"].get_xdata(orig=True)) == x


def test_a_figure_that_cannot_be_saved_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="jpx"):
        figures.save(Figure(), tmp_path / "picture.jpx")
    figures.save(Figure(), tmp_path / "picture.svg")
    with pytest.raises(OSError, match=r"picture\.svg"):
        figures.save(Figure(), tmp_path / "picture.svg/picture.png")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.svg"]


def test_accuracy_against_epoch():
    history = [{"epoch": 1, "train/accuracy": 0.5}, {"epoch": 2, "train/accuracy": 0.6, "val/accuracy": 0.55}]
    history.append({"epoch": 3, "train/accuracy": None})  # not finite
    [axis] = figures.accuracy(history[::-1]).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["train: last 60.0%, best 60.0% (epoch 2)", "validation: last 55.0%, best 55.0% (epoch 2)"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
@pytest.mark.parametrize(("low", "span"), [(0, 0), (0, 0.02), (0.941, 0.0003), (0.1, 0.9), (0.5, 0.11), (0, 1e-4)])
def test_ticks_do_not_repeat(epochs, low, span):
    history = [{"epoch": 1 + i, "val/accuracy": low + span * i / epochs} for i in range(epochs)]
    figure = figures.accuracy([*history, {"epoch": 1.5, "val/accuracy": low}])
    figure.draw_without_rendering()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        texts = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
        assert len(set(texts)) == len(texts) > 0
    assert all(re.fullmatch(r"−?\d+", label.get_text()) for label in figure.axes[0].get_xticklabels())  # epochs
    assert figure.axes[0].yaxis.label.get_window_extent().x0 >= 0


def test_equal_numbers_share_a_tick():
    groups = [make({"lr": text}, 0.5) for text in ("0.1", "0.2", "1e-1")]
    [axis] = figures.sweep(groups, ["lr"]).axes
    assert axis.get_xticks().tolist() == [0.1, 0.2]


def words(figure: Figure, path: Path) -> list[str]:
    """Save a figure, and return its texts as they are drawn."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figures.save(figure, path)
    return [html.unescape(text) for text in re.findall("<text[^>]*>([^<]*)</text>", path.read_text())]


NAMES = ["$\\frac{$", "$x_1$", "a_b^c"]


def test_texts_are_not_read_as_mathematics(tmp_path):
    groups = [make({"model": name}, 0.5 + place / 10, 0.1) for place, name in enumerate(NAMES)]
    drawn = words(figures.sweep(groups, ["model"]), tmp_path / "sweep.svg")
    assert {*NAMES, "model"} <= {*drawn}
    for group, name in zip(groups, NAMES, strict=True):
        group.name, group.label = name, "a"
    drawn = words(figures.comparison(groups), tmp_path / "comparison.svg")
    assert {f"{part}{name}" for name in NAMES for part in ("a  ", "model=")} <= {*drawn}
    groups = [make({"lr": text}, 0.5) for text in ("0.000123", "0.0123456")]
    drawn = words(figures.sweep(groups, ["lr"]), tmp_path / "log.svg")
    assert "mathdefault" not in "".join(drawn)
    figure = Figure()
    figure.subplots().plot([1, 2], label="$x_1$")
    figure.axes[0].set(title="$x_2$", xlabel="$x_3$")
    figure.axes[0].legend()
    drawn = words(figure, tmp_path / "other.svg")
    assert {"$x_1$", "$x_2$", "$x_3$"} <= {*drawn}


@pytest.mark.filterwarnings("error")
def test_any_name_can_be_drawn(tmp_path):
    """A byte that is not UTF-8, a control character, and a character that the font lacks."""
    groups = [make({"model": name}, 0.5, 0.1) for name in ("caf\udce9", "\x1b[2J", "猫")]
    figures.save(figures.sweep(groups, ["model"]), tmp_path / "sweep.png")
    for group in groups:
        group.name = group.settings["model"]
    figures.save(figures.comparison(groups), tmp_path / "comparison.png")
