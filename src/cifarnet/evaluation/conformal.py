"""Conformal prediction: sets of classes that contain the true class with a chosen probability."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cifarnet.evaluation import metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.seeding import generator

PENALTY, FREE_RANKS = 0.1, 2  # λ and k_reg of RAPS


def section(subject: Subject) -> Section:
    """Return the coverage and the sizes of conformal sets on the test images.

    The sets contain the classes whose score is at most a threshold, a quantile of the scores of the true classes of the
    validation images (split conformal prediction, Vovk et al., 2005; Papadopoulos et al., 2002).
    """
    if subject.val is None:
        return None, {}
    alpha, seed, names = subject.config.alpha, subject.config.seed, subject.data.class_names
    val, test = (scores(part.logits, seed, kind) for part, kind in ((subject.val, "val"), (subject.test, "test")))
    sets = {}
    for method in test:
        limit = threshold(val[method].gather(1, subject.val.labels[:, None]).flatten(), alpha)
        sets[method] = {"threshold": limit, **describe(test[method] <= limit, subject.test.labels, names)}
    return {"alpha": alpha, "val_images": len(subject.val.labels), "sets": sets}, {}


def scores(logits: Tensor, seed: int, kind: str) -> dict[str, Tensor]:
    """Return the scores of all classes by method, each float64 [N, num_classes].

    - "LAC": 1 - the probability of the class (Sadinle et al., 2019, https://arxiv.org/abs/1609.00451)
    - "APS": the sum of the probabilities of the more probable classes, plus a random fraction of the probability of the
      class (Romano et al., 2020, https://arxiv.org/abs/2006.02544)
    - "RAPS": as APS, plus λ for each rank of the class after k_reg (Angelopoulos et al., 2021,
      https://arxiv.org/abs/2009.14193)

    Args:
        logits: float [N, num_classes].
        seed, kind: determine the random fractions, one for each image.
    """
    probabilities = logits.double().softmax(1)
    values, order = probabilities.sort(descending=True, stable=True)
    fraction = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator(seed, 0, f"conformal {kind}"))
    ranked = values.cumsum(1) - (1 - fraction) * values
    penalty = PENALTY * torch.arange(1 - FREE_RANKS, 1 - FREE_RANKS + logits.shape[1]).clamp_min(0)
    by_class = order.argsort(1)  # the positions of the classes in `order`
    return {"LAC": 1 - probabilities, "APS": ranked.gather(1, by_class), "RAPS": (ranked + penalty).gather(1, by_class)}


def threshold(true_scores: Tensor, alpha: float) -> float:
    """Return the ⌈(n + 1)(1 - alpha)⌉-th smallest of the scores of n true classes; infinity if n is too small.

    A set of the classes with at most this score contains the true class of another image from the same distribution
    with a probability of at least 1 - alpha.
    """
    rank = math.ceil(round((len(true_scores) + 1) * (1 - alpha), 9))  # 10 * (1 - 0.7) is slightly more than 3
    return true_scores.sort().values[rank - 1].item() if rank <= len(true_scores) else math.inf


def describe(sets: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the coverage and the sizes of sets, bool [N, num_classes], overall and for the images of each class."""
    covered, sizes = sets.gather(1, labels[:, None]).flatten(), sets.sum(1)

    def among(chosen: Tensor) -> dict[str, Any]:
        share = metrics.proportion(int(covered[chosen].sum()), int(chosen.sum()))
        return {"coverage": share.pop("accuracy"), **share, "mean_size": sizes[chosen].double().mean().item()}

    count = sizes.bincount(minlength=len(class_names) + 1).tolist()  # the number of images with 0, 1, … classes
    rows = [{"name": name, **among(labels == label)} for label, name in enumerate(class_names)]
    return {**among(torch.ones_like(covered)), "sizes": count, "classes": rows}
