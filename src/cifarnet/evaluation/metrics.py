"""Metrics of logits: accuracy with its interval, calibration, and the distance from human labels."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from cifarnet.inference.figures import MANY

BINS = 15  # the number of intervals of the confidence, the probability of the predicted class, for calibration errors


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose largest logit, [N, num_classes], is that of the label, int64 [N]."""
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def summary(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return accuracy, top-2 accuracy and calibration of logits [N, num_classes] for labels, int64 [N].

    With more than `MANY` classes, the result includes the top-5 accuracy.
    """
    correct, num_classes = int((logits.argmax(1) == labels).sum()), logits.shape[1]
    ks = (2, 5) if num_classes > MANY else (2,)
    top = {f"top{k}_accuracy": multiclass_accuracy(logits, labels, num_classes, "micro", k).item() for k in ks}
    return {**proportion(correct, len(labels)), **top, **calibration(logits, labels)}


def proportion(correct: int, count: int) -> dict[str, Any]:
    """Return a proportion and its 95% interval (Wilson, 1927, doi:10.1080/01621459.1927.10502953).

    Both are NaN if `count` is 0.
    """
    if count == 0:
        return {"images": 0, "accuracy": math.nan, "interval": [math.nan, math.nan]}
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return {"images": count, "accuracy": correct / count, "interval": [float(end) for end in interval]}


def paired_interval(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the 95% interval of the change of the accuracy from one network to another on the same images.

    It is the interval "Wald+2" of Agresti and Min (2005, doi:10.1002/sim.1781), which adds 1/2 to each cell of the 2×2
    table of right and wrong predictions.

    Args:
        before, after: whether each network classifies each image correctly, bool [N].
    """
    gained, lost, count = int((after & ~before).sum()), int((before & ~after).sum()), len(before) + 2
    center = (gained - lost) / count
    margin = float(norm.ppf(0.975)) * math.sqrt(gained + lost + 1 - center * (gained - lost)) / count
    return max(-1.0, center - margin), min(1.0, center + margin)


def by_class(confusion: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the accuracy, precision and F1 of each class, given a confusion matrix, int64 [true, predicted].

    The accuracy on the images of a class is its recall. F1 = 2F*/(1 + F*) is an increasing function of the proportion
    F* = TP / (TP + FP + FN) (Hand et al., 2021, doi:10.1007/s10994-021-05964-1), and so are the ends of its interval.
    A value is NaN for a class without images (accuracy), without predictions (precision), or without both (F1).
    """
    columns = (confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist())
    rows = []
    for name, correct, images, predicted in zip(class_names, *columns, strict=True):
        precision, star = proportion(correct, predicted), proportion(correct, images + predicted - correct)
        f1, *ends = (2 * share / (1 + share) for share in (star["accuracy"], *star["interval"]))
        row = {"name": name, **proportion(correct, images), "predicted": predicted}
        row |= {"precision": precision["accuracy"], "precision_interval": precision["interval"]}
        rows.append(row | {"f1": f1, "f1_interval": ends})
    return rows


def calibration(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """Return cross-entropy, expected calibration error and Brier score of softmax(logits / temperature).

    The calibration error is the mean of |accuracy - mean confidence| over the bins, weighted by their number of images
    (Naeini et al., 2015). The Brier score is the squared distance from the one-hot label, from 0 to 2.
    """
    scaled = logits.double() / temperature
    probabilities = scaled.softmax(1)
    distance = probabilities - F.one_hot(labels, logits.shape[1])
    # torchmetrics puts a confidence of exactly 1 in a separate bin; the next smaller float32 is in the last bin
    below_one = probabilities.clamp_max(1 - 2**-24)
    error = multiclass_calibration_error(below_one, labels, num_classes=logits.shape[1], n_bins=BINS, norm="l1")
    return {
        "cross_entropy": F.cross_entropy(scaled, labels).item(),
        "calibration_error": error.item(),
        "brier": distance.square().sum(1).mean().item(),
    }


def bins(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> list[dict[str, float]]:
    """Return the bins of the calibration error; accuracy and confidence are NaN in empty bins."""
    confidence, predicted = (logits.double() / temperature).softmax(1).max(1)
    bin_index = (confidence * BINS).long().clamp_max(BINS - 1)
    count = bin_index.bincount(minlength=BINS)
    means = (bin_index.bincount(values, BINS) / count for values in (confidence, (predicted == labels).double()))
    rows = zip(range(BINS), count.tolist(), *(mean.tolist() for mean in means), strict=True)
    return [
        {"from": i / BINS, "to": (i + 1) / BINS, "images": images, "confidence": mean, "accuracy": accuracy}
        for i, images, mean, accuracy in rows
    ]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T, from 0.05 to 20, that minimizes the cross-entropy of softmax(logits / T).

    Fit T on images that are used neither for training nor for testing (Guo et al., 2017,
    https://arxiv.org/abs/1706.04599).
    """
    logits = logits.double()
    found: Any = minimize_scalar(  # the cross-entropy is convex in 1/T, so it has one minimum
        lambda log_t: F.cross_entropy(logits / math.exp(log_t), labels).item(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return math.exp(found.x)


def against_humans(logits: Tensor, humans: Tensor, temperature: float | None) -> dict[str, float]:
    """Return the cross-entropy against the distribution of human labels, [N, num_classes], and its lower bound.

    The lower bound is the entropy of that distribution (Peterson et al., 2019, https://arxiv.org/abs/1908.07086).
    """
    entropy = torch.special.entr(humans).sum(1).mean().item()
    distance = {"cross_entropy": F.cross_entropy(logits.double(), humans).item(), "entropy": entropy}
    if temperature is not None:
        distance["cross_entropy_with_temperature"] = F.cross_entropy(logits.double() / temperature, humans).item()
    return distance
