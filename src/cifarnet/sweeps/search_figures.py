"""Figures of a search: its history, the importance of each setting, and the score for each setting."""

import itertools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cifarnet.errors import printable
from cifarnet.records.tables import Group, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial


def draw(study: "Study", folder: Path) -> None:
    """Write `history.png`, `importances.png` and `slices.png` into a folder, if at least two trials are complete."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(trials) < 2:
        return
    from cifarnet.records import figures

    settings = [{key: str(value) for key, value in trial.params.items()} for trial in trials]
    runs = [
        Run(folder / str(trial.number), values, numbers={"val_accuracy": trial.value or 0.0})
        for trial, values in zip(trials, settings, strict=True)
    ]
    groups = [Group(run.settings, [run], "val_accuracy") for run in runs]
    figures.save(_history(trials), folder / "history.png")
    figures.save(_importances(study), folder / "importances.png")
    figures.save(figures.sweep(groups, list(trials[0].params)), folder / "slices.png")


def _history(trials: "list[FrozenTrial]") -> "Figure":
    """Draw the score of each trial, which counts from 1, and the best score so far."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from cifarnet.records import figures

    figure, axis = figures.panel("trial", "val accuracy")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    numbers, scores = [trial.number + 1 for trial in trials], [trial.value or 0.0 for trial in trials]
    best = max(scores)
    axis.plot(numbers, scores, "o", color=figures.TRAIN, label="trials")
    label = f"best so far: {best:.1%} (trial {numbers[scores.index(best)]})"
    axis.step(numbers, list(itertools.accumulate(scores, max)), where="post", color=figures.VAL, label=label)
    axis.legend(frameon=False)
    return figure


def _importances(study: "Study") -> "Figure":
    """Draw the importance of each setting for the score (PED-ANOVA, Watanabe et al., 2023)."""
    from matplotlib.ticker import PercentFormatter
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    from cifarnet.records import figures

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is experimental
        importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    figure, axis = figures.panel("importance for the validation accuracy", "")
    names = [printable(name) for name in importances]
    bars = axis.barh(names, list(importances.values()), color=figures.TRAIN)
    axis.bar_label(bars, fmt="{:.0%}", padding=3)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.invert_yaxis()
    return figure
