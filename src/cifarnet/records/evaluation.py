"""An evaluation's record: the `metrics.json` that `cifarnet.evaluate` writes."""

from dataclasses import dataclass
from typing import Any

from cifarnet.records.json_file import JsonFile
from cifarnet.records.record import Data

Summary = dict[str, Any]  # metrics on a set of images; `interval` is the 95% interval of the accuracy


@dataclass(kw_only=True)
class Evaluation(JsonFile):
    """The content of an evaluation's `metrics.json`. Accuracies are from 0 to 1.

    Attributes:
        checkpoint: the path of the checkpoint; for an ensemble, the number of runs. `parameters` is then the sum over
            all networks, `epoch` the largest, and `training_settings` empty.
        epoch: the epoch (from 1) after which the checkpoint was saved.
        data: the data set of the evaluation, of which `train` counts all training images; the record of the run states
            which of them it was trained on.
        test_accuracy_one_view: the test accuracy without test-time augmentation.
        val: the metrics on the validation images. Without validation images, `val`, `temperature` and
            `test_with_temperature` are None.
        temperature: the number that divides the logits, fitted on the validation images.
        calibration_bins, classes: a row for each bin and class; accuracies are None in rows without images.
        macro_f1: the mean F1 of all classes with test images or predictions.
        confusion: the number of images, as [true class][predicted class].
        cifar10h, corruptions, cifar10_c, cifar10_1, selective, conformal, ood, adversarial, features: None if not
            measured.
        ood: the results of `ood.separation` by score, by the name of the set of images.
        members: for an ensemble, the metrics of its `runs`, their `mean` and standard `deviation`; the metrics of a
            network with the mean of their weights, `soup`; and the `share` of images on which two of them disagree.
    """

    checkpoint: str
    network: str
    parameters: int
    epoch: int
    class_names: list[str]
    tta: str
    tta_share: float
    precision: str | int
    data: Data
    training_settings: dict[str, str]
    hardware: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    command: str
    config: dict[str, Any]
    test: Summary
    test_accuracy_one_view: float
    val: Summary | None
    temperature: float | None
    test_with_temperature: dict[str, float] | None
    calibration_bins: list[dict[str, float | None]]
    classes: list[dict[str, Any]]
    confusion: list[list[int]]
    mistakes: list[dict[str, Any]]
    cifar10h: dict[str, float] | None
    corruptions: dict[str, Any] | None
    cifar10_c: dict[str, Any] | None
    cifar10_1: dict[str, Summary] | None
    finished: str
    macro_f1: float | None = None
    selective: dict[str, Any] | None = None
    conformal: dict[str, Any] | None = None
    ood: dict[str, Any] | None = None
    adversarial: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    members: dict[str, Any] | None = None
