"""Features, the inputs of a network's last layer: their quality, and a map of the test images."""

from cifarnet.evaluation.subject import Section, Subject


def section(subject: Subject) -> Section:
    return None, {}
