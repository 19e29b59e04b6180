"""Figures of a search: its history, the importance of each setting, and the score for each setting."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna import Study
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from cifarnet.errors import printable
from cifarnet.records import figures
from cifarnet.records.tables import Run, grouped


def draw(study: Study, runs: Mapping[str, Run], keys: Sequence[str], folder: Path) -> None:
    """Write `history.png`, `importances.png` and `slices.png` into a folder, if at least two trials are complete.

    Args:
        runs: the trials of the study, by number.
        keys: the settings that are searched.
    """
    runs = {number: run for number, run in runs.items() if run.status == "done"}
    if len(runs) < 2:
        return
    scores = {int(number) + 1: run.score for number, run in runs.items()}  # trials count from 1
    figures.save(_history(scores), folder / "history.png")
    figures.save(_importances(study), folder / "importances.png")
    figures.save(figures.sweep(grouped(list(runs.values()), "val_accuracy"), keys), folder / "slices.png")


def _history(scores: Mapping[int, float]) -> Figure:
    """Draw the score of each trial, and the best score so far."""
    figure, axis = figures.panel("trial", "val accuracy")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.plot(list(scores), list(scores.values()), "o", color=figures.TRAIN, label="trials")
    best = max(scores, key=lambda number: scores[number])
    label = f"best so far: {scores[best]:.1%} (trial {best})"
    steps = list(itertools.accumulate(scores.values(), max))
    axis.step(list(scores), steps, where="post", color=figures.VAL, label=label)
    axis.legend(frameon=False)
    return figure


def _importances(study: Study) -> Figure:
    """Draw the importance of each setting for the score (PED-ANOVA, Watanabe et al., 2023)."""
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
