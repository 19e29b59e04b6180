"""The record of a run, `metrics.json`: the metrics and everything that they depend on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, get_type_hints

from cifarnet.records.json_file import JsonFile


class TrainingLabels(TypedDict, total=False):
    """The number of training images per class, and of training labels that are not those of the data set; and the
    first 16 digits of a checksum of the numbers in the files `data.labels` and `data.keep`."""

    train_per_class: list[int]
    wrong_labels: int
    files_sha256: str


class Data(TrainingLabels):
    """The number of images of a run or an evaluation, and a checksum of all pixels and labels (None if streamed).

    The labels are described if a setting changes them, or if it selects images other than those for validation."""

    source: str
    classes: int
    train: int
    val: int
    test: int
    sha256: str | None


class Session(TypedDict):
    """A part of a run's training without interruptions. A resumed run has several sessions."""

    from_step: int
    precision: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    started: str


@dataclass(kw_only=True)
class Record(JsonFile):
    """The content of a run's `metrics.json`. Accuracies are from 0 to 1, times in seconds.

    Attributes:
        val_accuracy: the validation accuracy of the tested weights; NaN without validation images.
        tested_epoch, tested_step: the epoch (from 1) and the step after which the tested weights were saved.
        partial: the settings that made the run skip images, such as "fast_dev_run=True"; None: it used all images.
        test_accuracy_one_view: the test accuracy without test-time augmentation.
        seconds: the time of the training batches; `fit_seconds` is the time before the first batch.
        precision, hardware, versions, git_commit: the values of the last session. The keys of `hardware` are device,
            name, threads, system, and ranks if there were several.
        config: the config as composed, with `${…}`; in `resolved`, which has no section `logger`, they
            are replaced with their values.
        history: the metrics of each epoch; `within_epochs` contains the validations before the end of an epoch.
            A value that was not finite is None after reading.
    """

    name: str
    val_accuracy: float
    tested_epoch: float
    tested_step: int
    test_accuracy: float
    test_cross_entropy: float
    partial: str | None = None
    tta: str
    test_accuracy_one_view: float
    epochs: int
    fit_seconds: float
    seconds: float
    test_seconds: float
    compile_seconds: float
    images_per_second: float
    parameters: int
    seed: int
    precision: str
    hardware: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    git_commit: str | None
    sessions: list[Session] = field(repr=False)
    data: Data
    finished: str
    overrides: list[str]
    config: dict[str, Any] = field(repr=False)
    resolved: dict[str, Any] = field(repr=False)
    history: Sequence[Mapping[str, float | None]] = field(repr=False)
    within_epochs: Sequence[Mapping[str, float | None]] = field(repr=False)

    def numbers(self) -> dict[str, float]:
        """Return the finite numbers of the record, by name. Runs can be compared by these numbers."""
        return {name: getattr(self, name) for name in NUMBERS if math.isfinite(getattr(self, name))}


NUMBERS = tuple(name for name, hint in get_type_hints(Record).items() if hint in (int, float))
