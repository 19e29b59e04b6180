"""Selective prediction: the accuracy on the images that a network is most certain about."""

import math
from typing import Any

import torch
from torch import Tensor

from cifarnet.evaluation import figures, metrics
from cifarnet.evaluation.subject import Section, Subject

COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)  # the fractions of the test images in the report
RISK = 0.01  # the report states how many images can be classified at this risk


def section(subject: Subject) -> Section:
    """Return the accuracy on the most confident test images, and the area under the risk-coverage curve.

    The confidence is the largest softmax probability; the risk is the fraction of mistakes among the images with the
    highest confidence; their fraction of all images is the coverage (El-Yaniv and Wiener, 2010; Geifman and El-Yaniv,
    2017, https://arxiv.org/abs/1705.08500). The area, AURC, is the mean risk over all coverages; the excess AURC is its
    difference from the AURC of the best order, in which all mistakes come last (Geifman et al., 2019,
    https://arxiv.org/abs/1805.08206).
    """
    confidence, predicted = subject.test.logits.double().softmax(1).max(1)
    wrong = predicted != subject.test.labels
    ranks, levels, total = torch.arange(1, len(wrong) + 1), confidence.sort(descending=True).values, len(wrong)
    risk, best = (mistakes_among(order, wrong) / ranks for order in (confidence, -wrong.double()))
    aurc, excess = risk.mean().item(), (risk - best).mean().item()

    def among(count: int) -> dict[str, Any]:
        """Return the accuracy on this number of images, and the smallest confidence among them."""
        correct, level = round(count * (1 - risk[count - 1].item())), levels[max(count, 1) - 1].item()
        return {"coverage": count / total, "confidence": level, **metrics.proportion(correct, count)}

    rows = [among(math.ceil(coverage * total)) for coverage in COVERAGES]
    record = {"aurc": aurc, "excess_aurc": excess, "coverages": rows, "risk": RISK}
    record["at_most_risk"] = among(int((ranks * (risk <= RISK)).max()))
    title = f"AURC {aurc:.4f}, {excess:.4f} above that of the best possible order"
    return record, {"selective": figures.risk_coverage(risk.numpy(), best.numpy(), title)}


def mistakes_among(confidence: Tensor, wrong: Tensor) -> Tensor:
    """Return how many of the k most confident images are mistakes, for k from 1 to N, as float64 [N].

    Among images of the same confidence, it is the mean over all orders, so that their order in the data has no effect.

    Args:
        confidence: a number for each image, [N].
        wrong: whether the prediction is a mistake, bool [N].
    """
    level = confidence.unique(return_inverse=True)[1]
    rate = level.bincount(wrong.double()) / level.bincount()
    return rate[level.sort(descending=True).values].cumsum(0)
