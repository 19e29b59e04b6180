"""The runs of an ensemble beside the ensemble itself, and beside a network with the mean of their weights."""

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from cifarnet.evaluation import metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.inference.ensemble import Ensemble, make_soup
from cifarnet.records.evaluation import Summary
from cifarnet.records.tables import decimals, percent

# by the headings of the table
METRICS = {"accuracy": "accuracy", "cross-entropy": "cross_entropy"}
METRICS |= {"calibration error": "calibration_error", "Brier score": "brier"}


def section(subject: Subject) -> Section:
    """Return the metrics of each run on the test images, their means and standard deviations, and the disagreement."""
    ensemble, test = subject.predictor, subject.test
    if not isinstance(ensemble, Ensemble):
        return None, {}
    rows = zip(ensemble.members, test.members, strict=True)
    runs = [{"checkpoint": path, **metrics.summary(logits, test.labels)} for path, logits in rows]
    mean, deviation = ({key: f(run[key] for run in runs) for key in METRICS.values()} for f in (fmean, stdev))
    soup = None
    if subject.config.soup:
        predictor = make_soup(list(ensemble.members.values()), subject.data)
        soup = metrics.summary(predictor.predict_all(subject.data.test_dataloader(), "soup").logits, test.labels)
    record = {"runs": runs, "mean": mean, "deviation": deviation, "disagreement": disagreement(test.members)}
    return record | {"soup": soup}, {}


def disagreement(members: Sequence[Tensor]) -> dict[str, Any]:
    """Return the share of the images for which two networks predict different classes, a mean over all pairs.

    The interval is that of a proportion of the images, which is wider than necessary for a mean over several pairs.

    Args:
        members: logits [N, num_classes] of each network.
    """
    predicted = [logits.argmax(1) for logits in members]
    share = fmean((one != other).double().mean().item() for one, other in combinations(predicted, 2))
    images = len(predicted[0])
    return {"images": images, "share": share, "interval": metrics.proportion(round(share * images), images)["interval"]}


def table(members: Mapping[str, Any], test: Summary) -> dict[str, list[str]]:
    """Return the columns of a table of the mean of the runs, the ensemble, the soup and each run, as text.

    The name of a run is the path of its folder, relative to the folder that contains all runs; if several checkpoints
    are in the same folder, the names are the paths of the checkpoints.

    Args:
        members, test: the parts of an `Evaluation`.
    """
    combined = {"ensemble": test} | ({"soup": members["soup"]} if members["soup"] else {})
    rows = [*combined.values(), *members["runs"]]
    paths = [Path(run["checkpoint"]).absolute() for run in members["runs"]]
    names = [path.relative_to(os.path.commonpath(paths)).as_posix() for path in paths]
    folders = [name.partition("/checkpoints/")[0] for name in names]
    columns = {"run": ["mean ± standard deviation", *combined, *(names if len({*folders}) < len(names) else folders)]}
    for heading, key in METRICS.items():
        form = f".{decimals(test['images'])}%" if key in ("accuracy", "calibration_error") else ".4f"
        spread = f"{members['mean'][key]:{form}} ± {members['deviation'][key]:{form}}"
        columns[heading] = [spread, *(format(row[key], form) for row in rows)]
    ends = ([percent(end, test["images"]) for end in row["interval"]] for row in rows)
    return columns | {"95% interval (accuracy)": ["", *(" to ".join(pair) for pair in ends)]}
