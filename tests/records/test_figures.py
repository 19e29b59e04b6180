import itertools
from pathlib import Path

import pytest
from matplotlib.figure import Figure

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


def ticks(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [tick.get_text() for tick in figure.axes[0].get_xticklabels()]


@pytest.mark.parametrize("key", VALUES)
def test_one_setting_is_drawn_with_error_bars(key, tmp_path):
    figure = figures.sweep(grid([key]), [key])
    figures.save(figure, tmp_path / "sweep.png")
    assert (labels(figure), ticks(figure)) == ([key], VALUES[key])
    [drawn] = figure.axes[0].containers
    assert len(drawn.lines[0].get_xdata()) == len(VALUES[key])
    assert figure.get_suptitle() == f"Validation accuracy, {len(VALUES[key])} settings"


def test_only_numbers_are_joined_and_a_wide_range_has_a_logarithmic_axis():
    lines = {key: figures.sweep(grid([key]), [key]).axes[0] for key in ("optimizer.lr", "model", "model.hidden")}
    assert {key: axis.containers[0].lines[0].get_linestyle() for key, axis in lines.items()} == {
        "optimizer.lr": "-",
        "model": "None",
        "model.hidden": "-",
    }
    assert {key: axis.get_xscale() for key, axis in lines.items()} == {
        "optimizer.lr": "log",
        "model": "linear",
        "model.hidden": "linear",
    }


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_settings_have_a_panel_each_with_a_ring_around_the_best(count, tmp_path):
    keys = list(VALUES)[:count]
    figure = figures.sweep(groups := grid(keys), keys)
    figures.save(figure, tmp_path / "sweep.png")
    assert labels(figure) == keys
    for axis in figure.axes[:count]:
        points, ring = axis.lines
        assert len(points.get_xdata()) == len(groups) - 1
        assert ring.get_ydata() == pytest.approx(max(group.mean for group in groups[:-1]))


def test_numbers_whose_labels_would_overlap_have_round_ticks():
    values = [0.0012345678, 0.0012345679, 0.03]
    figure = figures.sweep([make({"a": str(value)}, 0.5) for value in values], ["a"])
    assert ticks(figure) == ["0.001", "0.003", "0.01", "0.03"]


def test_a_sweep_without_accuracies_is_an_empty_figure(tmp_path):
    figures.save(figures.sweep([make({"a": "1"}, None)], ["a"]), tmp_path / "sweep.png")


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
    [axis] = figures.accuracy(history).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["train, last 60.0%", "validation, last 55.0%", "best 55.0%, epoch 2"]
    assert not figures.accuracy([]).axes[0].lines
