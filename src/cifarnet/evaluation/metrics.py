"""What is measured on logits: accuracy with its interval, calibration, distance from people's judgement."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

BINS = 15  # of the calibration error: equally wide, by the confidence, which is the probability of the predicted class


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of logits [N, num_classes] whose largest is that of the label, int64 [N]."""
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def summary(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy, top-2 accuracy and calibration of logits [N, num_classes] against labels int64 [N]."""
    correct = int((logits.argmax(1) == labels).sum())
    top2 = multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="micro", top_k=2)
    return {**proportion(correct, len(labels)), "top2_accuracy": top2.item(), **calibration(logits, labels)}


def proportion(correct: int, count: int) -> dict[str, Any]:
    """A share and its 95 % interval (Wilson, 1927, doi:10.1080/01621459.1927.10502953); both are NaN of no images."""
    if count == 0:
        return {"images": 0, "accuracy": math.nan, "interval": [math.nan, math.nan]}
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return {"images": count, "accuracy": correct / count, "interval": [float(end) for end in interval]}


def by_class(confusion: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy on the images of each class, out of the confusion matrix, int64 [true, predicted]. NaN where none."""
    rows = zip(class_names, confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
    return [{"name": name, **proportion(correct, count)} for name, correct, count in rows]


def calibration(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """Cross-entropy, expected calibration error and Brier score of softmax(logits / temperature).

    The error is the mean of the bins' |accuracy - mean confidence|, weighted by their images (Naeini et al., 2015).
    The Brier score is the squared distance from the one-hot label, 0 to 2.
    """
    scaled = logits.double() / temperature
    probabilities = scaled.softmax(1)
    distance = probabilities - F.one_hot(labels, logits.shape[1])
    # a confidence of exactly 1 would open a bin of its own; the largest float32 below 1 belongs to the last one
    below_one = probabilities.clamp_max(1 - 2**-24)
    error = multiclass_calibration_error(below_one, labels, num_classes=logits.shape[1], n_bins=BINS, norm="l1")
    return {
        "cross_entropy": F.cross_entropy(scaled, labels).item(),
        "calibration_error": error.item(),
        "brier": distance.square().sum(1).mean().item(),
    }


def bins(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> list[dict[str, float]]:
    """The bins of the calibration error, for the reliability diagram; accuracy and confidence are NaN in empty ones."""
    confidence, predicted = (logits.double() / temperature).softmax(1).max(1)
    place = (confidence * BINS).long().clamp_max(BINS - 1)
    count = place.bincount(minlength=BINS)
    means = (place.bincount(values, BINS) / count for values in (confidence, (predicted == labels).double()))
    rows = zip(range(BINS), count.tolist(), *(mean.tolist() for mean in means), strict=True)
    return [
        {"from": i / BINS, "to": (i + 1) / BINS, "images": images, "confidence": mean, "accuracy": accuracy}
        for i, images, mean, accuracy in rows
    ]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T, from 0.05 to 20, with the least cross-entropy of softmax(logits / T) (Guo et al., 2017,
    https://arxiv.org/abs/1706.04599). Fit it on images that are neither trained on nor tested."""
    logits = logits.double()
    found = minimize_scalar(  # the cross-entropy is convex in 1/T: it has one valley
        lambda place: F.cross_entropy(logits / math.exp(place), labels).item(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return math.exp(found.x)


def against_people(logits: Tensor, people: Tensor, temperature: float | None) -> dict[str, float]:
    """Cross-entropy against the distribution of people's labels, [N, num_classes] (Peterson et al., 2019,
    https://arxiv.org/abs/1908.07086). The entropy of their labels is the least that is possible."""
    entropy = torch.special.entr(people).sum(1).mean().item()
    distance = {"cross_entropy": F.cross_entropy(logits.double(), people).item(), "entropy": entropy}
    if temperature is not None:
        distance["cross_entropy_with_temperature"] = F.cross_entropy(logits.double() / temperature, people).item()
    return distance
