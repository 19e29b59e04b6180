"""A search's figures, as Optuna draws them: its history, how much each setting matters, and slices through each."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Study


def draw(study: "Study", folder: Path) -> None:
    """Into `history.png`, `importances.png` and `slices.png`, once two trials are done."""
    from optuna.trial import TrialState

    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < 2:
        return
    import matplotlib
    import numpy as np
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    from cifarnet.records import figures

    name = "validation accuracy"
    with warnings.catch_warnings(), matplotlib.rc_context({"figure.dpi": 150, "savefig.bbox": "tight"}):
        warnings.simplefilter("ignore")  # Optuna calls them experimental
        pyplot.switch_backend("agg")  # no windows
        drawn = {
            "history": plots.plot_optimization_history(study, target_name=name),
            "slices": plots.plot_slice(study, target_name=name),
        }
        drawn["importances"] = plots.plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        for file, axes in drawn.items():
            figure = np.ravel(axes)[0].figure
            figures.save(figure, folder / f"{file}.png")
            pyplot.close(figure)
