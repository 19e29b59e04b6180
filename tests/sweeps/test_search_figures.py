"""Figures of searches, whose trials are made up."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import Study, create_study
from optuna.trial import TrialState, create_trial

from cifarnet.records import figures
from cifarnet.records.tables import Run
from cifarnet.sweeps import search_figures

RECIPES = ("[]", "[mixup,cutmix]")


def make(rates: list[float], scores: list[float | None], log: bool = True) -> Study:
    """A study with a learning rate and a recipe; a trial without a score was pruned."""
    study = create_study(direction="maximize")
    space = {
        "optimizer.lr": FloatDistribution(min(rates), max(rates), log=log),
        "+recipe": CategoricalDistribution(RECIPES),
    }
    for number, (rate, score) in enumerate(zip(rates, scores, strict=True)):
        params = {"optimizer.lr": rate, "+recipe": RECIPES[number % 2]}
        state = TrialState.PRUNED if score is None else TrialState.COMPLETE
        study.add_trial(create_trial(params=params, distributions=space, value=score, state=state))
    return study


def draw(study: Study, folder: Path) -> None:
    runs = {}
    for trial in study.trials:
        numbers = {} if trial.value is None else {"val_accuracy": trial.value}
        settings = {key: str(value) for key, value in trial.params.items()}
        status = "pruned" if trial.value is None else "done"
        runs[str(trial.number)] = Run(folder / str(trial.number), settings, status, numbers=numbers)
    search_figures.draw(study, runs, ["optimizer.lr", "+recipe"], folder)


def test_trials_count_from_1_and_ticks_have_no_quotes(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.stem: figure}))
    rates, scores = [0.001, 0.01, 0.02, 0.1], [0.3, 0.2, None, 0.4]
    draw(make(rates, scores), tmp_path)

    [axis] = drawn["history"].axes
    trials, best = axis.lines
    assert list(zip(trials.get_xdata(), trials.get_ydata(), strict=True)) == [(1, 0.3), (2, 0.2), (4, 0.4)]
    assert list(best.get_ydata()) == [0.3, 0.3, 0.4]
    assert "best so far: 40.0% (trial 4)" in [text.get_text() for text in axis.get_legend().get_texts()]

    rate, recipe = drawn["slices"].axes
    assert sorted(rate.lines[0].get_xdata(orig=True)) == [0.001, 0.01, 0.1]
    assert (rate.get_xscale(), len(rate.lines)) == ("log", 1)
    assert [label.get_text() for label in recipe.get_xticklabels()] == list(RECIPES)
    assert [axis.get_xlabel() for axis in drawn["slices"].axes] == ["optimizer.lr", "+recipe"]

    [axis] = drawn["importances"].axes
    assert sum(bar.get_width() for bar in axis.patches) == pytest.approx(1)
    assert {label.get_text() for label in axis.get_yticklabels()} == {"optimizer.lr", "+recipe"}
    for figure in drawn.values():  # the style of all figures of this project
        assert not figure.axes[0].spines["top"].get_visible()


@pytest.mark.parametrize(
    ("rates", "log"),
    [([1e-3, 1.0, 1e300], True), ([1e-300, 1.0, 1e308], True), ([-1e308, 0.0, 1e308], False), ([0.1] * 3, False)],
)
def test_all_ranges_can_be_drawn(tmp_path, rates, log):
    draw(make(rates, [0.1, 0.2, 0.1], log), tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"history", "importances", "slices"}
