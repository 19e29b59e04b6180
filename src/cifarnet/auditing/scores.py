"""Scores of training images: how suspicious their labels are, according to the training dynamics of some runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifarnet.callbacks.dynamics import FILE
from cifarnet.errors import UserError, reason

EARLY = 10  # the epochs of EL2N
Dynamics = dict[str, np.ndarray]  # the arrays in `dynamics.npz`, see `callbacks.dynamics.Dynamics`


@dataclass
class Scored:
    """The scores of N training images. Larger values are more suspicious, except for `variability`.

    Attributes:
        index: the positions of the images in the training images of the data set, int64 [N], ascending.
        given: their labels in training, int64 [N].
        suggested: the most probable class other than the label, int64 [N]: that of the out-of-fold probabilities or,
            without them, the class that was predicted in most epochs; the label if no other class was predicted.
        values: the scores by name, float64 [N].
        count: the number of labels to correct: those of the first ranks.
        order: the score that determines the rank.
        agreement: the fraction of the labels that the networks predict that were not trained on the image; None without
            all folds.
    """

    index: np.ndarray
    given: np.ndarray
    suggested: np.ndarray
    values: dict[str, np.ndarray]
    count: int
    order: str = "negative_aum"
    agreement: float | None = None

    @property
    def ranked(self) -> np.ndarray:
        """The numbers of the images from 0 to N - 1, the most suspicious one first, int64 [N]."""
        return np.argsort(-self.values[self.order], kind="stable")


def read(paths: Sequence[str | Path]) -> dict[Path, Dynamics]:
    """Read the dynamics of runs, without the images that no epoch used, by the folder of the run.

    Args:
        paths: folders of runs, and of sweeps, which stand for all of their runs.

    Raises:
        UserError: a path contains no dynamics, or a file is damaged.
    """
    runs: dict[Path, Dynamics] = {}
    for path in map(Path, paths):
        if not (found := sorted([*path.glob(FILE), *path.glob(f"*/{FILE}")])):
            raise UserError(f"{path} contains no {FILE}. Specify runs that were trained with callbacks=dynamics.")
        for file in found:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    names, used = arrays["class_names"], (arrays["predicted"] >= 0).any(0)
                    of_images = {name: arrays[name][..., used] for name in arrays if name != "class_names"}
            except Exception as error:  # a damaged file can raise many types
                raise UserError(f"{file} cannot be read: {reason(error)}. Train the run again.") from error
            runs[file.parent] = {**of_images, "class_names": names}
    return runs


def of_run(run: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the scores of the images of one run, float64 [N].

    - forgetting: the number of changes from a right to a wrong prediction between two epochs that used the image, or
      the number of epochs if no prediction was right (Toneva et al., 2019, https://arxiv.org/abs/1812.05159).
    - negative_aum: minus the mean margin (Pleiss et al., 2020, https://arxiv.org/abs/2001.10528).
    - hardness: 1 minus the mean probability of the label, and variability: its standard deviation; the axes of a data
      map (Swayamdipta et al., 2020, https://arxiv.org/abs/2009.10795).
    - el2n: the mean error of the first `EARLY` epochs (Paul et al., 2021, https://arxiv.org/abs/2107.07075).
    """
    used, correct = run["predicted"] >= 0, run["predicted"] == run["labels"]
    forgetting, was_correct = np.zeros(len(run["labels"])), np.zeros(len(run["labels"]), bool)
    for now, is_used in zip(correct, used, strict=True):
        forgetting += is_used & was_correct & ~now
        was_correct = np.where(is_used, now, was_correct)
    confidence = _mean(run["probability"], used)
    return {
        "forgetting": np.where(correct.any(0), forgetting, len(correct)),
        "negative_aum": -_mean(run["margin"], used),
        "hardness": 1 - confidence,
        "variability": np.sqrt(_mean((run["probability"] - confidence) ** 2, used)),
        "el2n": _mean(run["error"], used & (used.cumsum(0) <= EARLY)),
    }


def _mean(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return the mean of each column of values [E, N] over the used ones, float64 [N]."""
    return np.where(used, values, 0).sum(0, dtype=np.float64) / used.sum(0)


def combine(runs: Sequence[Dynamics]) -> Scored:
    """Return the scores of all images of some runs: the means over the runs that were trained on an image. The count is
    1% of the images.

    Raises:
        UserError: the runs have different classes or labels.
    """
    index, rows = np.unique(np.concatenate([run["index"] for run in runs]), return_inverse=True)
    labels, given = np.concatenate([run["labels"] for run in runs]), np.zeros(len(index), np.int64)
    given[rows] = labels
    names = runs[0]["class_names"].tolist()
    if (given[rows] != labels).any() or any(run["class_names"].tolist() != names for run in runs):
        remedy = "data.label_noise depends on the fold: write the labels to a file, and use data.labels=<file>"
        raise UserError(f"The runs have different classes or labels. Audit runs on the same data; {remedy}.")
    scores, times = [of_run(run) for run in runs], np.bincount(rows)
    values = {name: np.bincount(rows, np.concatenate([one[name] for one in scores])) / times for name in scores[0]}
    counts = (np.concatenate([(run["predicted"] == label).sum(0) for run in runs]) for label in range(len(names)))
    votes = np.stack([np.bincount(rows, count) for count in counts], 1)
    return Scored(index, given, best_other(votes, given), values, round(len(index) / 100))


def best_other(votes: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return the class with the most votes, [N, num_classes], other than the label; the label if there is none."""
    others = votes.copy()
    others[np.arange(len(given)), given] = 0
    return np.where(others.any(1), others.argmax(1), given)
