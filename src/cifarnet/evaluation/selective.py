"""Selective prediction: the accuracy on the images that a network is most certain about."""

import math

import torch

from cifarnet.evaluation import figures, metrics
from cifarnet.evaluation.subject import Section, Subject

COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)  # the fractions of the test images in the report


def section(subject: Subject) -> Section:
    """Return the accuracy on the most confident test images, and the area under the risk-coverage curve.

    The confidence is the largest softmax probability; the risk is the fraction of mistakes among the images with the
    highest confidence; their fraction of all images is the coverage (El-Yaniv and Wiener, 2010; Geifman and El-Yaniv,
    2017, https://arxiv.org/abs/1705.08500). The area, AURC, is the mean risk over all coverages; the excess AURC is its
    difference from the AURC of the best order, in which all mistakes come last (Geifman et al., 2019,
    https://arxiv.org/abs/1805.08206).
    """
    confidence, predicted = subject.test.logits.double().softmax(1).max(1)
    confidence, order = confidence.sort(descending=True, stable=True)
    wrong = (predicted != subject.test.labels)[order].double()
    total, ranks = len(wrong), torch.arange(1, len(wrong) + 1)
    risk, best = (mistakes.cumsum(0) / ranks for mistakes in (wrong, wrong.sort().values))
    aurc, excess = risk.mean().item(), (risk - best).mean().item()
    rows = []
    for count in (math.ceil(coverage * total) for coverage in COVERAGES):
        accuracy = metrics.proportion(count - int(wrong[:count].sum()), count)
        rows.append({"coverage": count / total, "confidence": confidence[count - 1].item(), **accuracy})
    title = f"AURC {aurc:.4f}, {excess:.4f} above that of the best possible order"
    drawn = {"selective": figures.risk_coverage(risk.numpy(), best.numpy(), title)}
    return {"aurc": aurc, "excess_aurc": excess, "coverages": rows}, drawn
