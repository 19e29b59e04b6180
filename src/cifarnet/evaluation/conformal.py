"""Conformal prediction: sets of classes that contain the true class with a chosen probability."""

from cifarnet.evaluation.subject import Section, Subject


def section(subject: Subject) -> Section:
    return None, {}
