"""Optuna's figures of a search: its history, the importance of each setting, and the score for each setting."""

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Study


def draw(study: "Study", folder: Path) -> None:
    """Write `history.png`, `importances.png` and `slices.png` into a folder, if at least two trials are complete."""
    from optuna.trial import TrialState

    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < 2:
        return
    import matplotlib
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    from cifarnet.records import figures

    importances = partial(plots.plot_param_importances, evaluator=PedAnovaImportanceEvaluator())
    drawing = {"history": plots.plot_optimization_history, "slices": plots.plot_slice, "importances": importances}
    with warnings.catch_warnings(), matplotlib.rc_context({"figure.dpi": 150, "savefig.bbox": "tight"}):
        warnings.simplefilter("ignore")  # these functions are experimental
        pyplot.switch_backend("agg")  # draws without a window
        for name, draw_figure in drawing.items():
            draw_figure(study, target_name="validation accuracy")
            figures.save(pyplot.gcf(), folder / f"{name}.png")
            pyplot.close()
