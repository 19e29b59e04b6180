"""What the networks of the runs say about images: out-of-fold probabilities, and near-duplicates by their features."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cifarnet.auditing.scores import Dynamics, Scored, best_other
from cifarnet.data import Split
from cifarnet.inference.predictor import Predictor
from cifarnet.recipes.backbone import head_inputs

CHUNK = 250  # the number of images in a forward pass
Pair = tuple[float, int, int]  # the similarity, and the positions in the training images and in the test images


def confident_learning(
    scored: Scored, runs: Sequence[Dynamics], predictors: Iterable[Predictor], train: Split
) -> np.ndarray | None:
    """Add the score `out_of_fold`, its suggestions, and the number of wrong labels according to confident learning
    (Northcutt et al., 2021, https://arxiv.org/abs/1911.00068), if each image was left out by a run, as in all folds.

    The score is 1 minus the probability of the label according to the networks that were not trained on the image.

    Args:
        predictors: the networks of the runs.
        train: all training images of the data set.

    Returns:
        The mean probabilities of these networks, float64 [N, num_classes]; None if there are not all folds.
    """
    left_out = [np.isin(scored.index, run["index"], invert=True) for run in runs]
    if not (times := np.sum(left_out, 0)).all():
        return None
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    sums = np.zeros((len(times), len(runs[0]["class_names"])))
    for number, (rows, predictor) in enumerate(zip(left_out, predictors, strict=True), 1):
        chunks = _chunks(train[torch.from_numpy(scored.index[rows])], f"Images left out by run {number}")
        predicted = [predictor(chunk)[0].double().softmax(1).cpu() for chunk in chunks]
        sums[rows] += torch.cat([torch.zeros(0, sums.shape[1]), *predicted]).numpy()
    probabilities = sums / times[:, None]
    scored.values["out_of_fold"] = 1 - get_label_quality_scores(scored.given, probabilities)  # the self-confidence
    scored.suggested, scored.order = best_other(probabilities, scored.given), "out_of_fold"
    scored.count = int(find_label_issues(scored.given, probabilities, n_jobs=1).sum())
    return probabilities


def near_duplicates(predictor: Predictor, train: Split, test: Split, most: int) -> list[Pair]:
    """Find the most similar training image of each test image, by the cosine similarity of their features, and return
    the `most` pairs of highest similarity.

    Barz and Denzler (2020, https://arxiv.org/abs/1902.00423) found the near-duplicates in CIFAR-10 in this way.
    """
    best, nearest, start = torch.full((len(test),), -torch.inf), torch.zeros(len(test), dtype=torch.int64), 0
    with head_inputs(predictor.network) as inputs:

        def directions(images: Split, title: str) -> Iterator[Tensor]:
            for chunk in _chunks(images, title):
                predictor(chunk)
                yield F.normalize(inputs.pop())

        targets = torch.cat(list(directions(test, "Features of the test images"))).T
        for rows in directions(train, "Comparing the training images"):
            similarity, row = (rows @ targets).max(0)
            nearest = torch.where(similarity > best, start + row, nearest)
            best = torch.maximum(best, similarity)
            start += len(rows)
    chosen = best.argsort(descending=True, stable=True)[:most]
    return list(zip(best[chosen].tolist(), nearest[chosen].tolist(), chosen.tolist(), strict=True))


def _chunks(images: Split, title: str) -> Iterable[Tensor]:
    return tqdm(images.chunks(CHUNK), title, -(-len(images) // CHUNK), leave=False, disable=None)
