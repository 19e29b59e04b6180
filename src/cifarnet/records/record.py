"""A run's record: `metrics.json`, with its figures and what they depend on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, get_type_hints

from cifarnet.records.json_file import JsonFile


class Data(TypedDict):
    """The images of a run or an evaluation: counts, and a checksum of all pixels and labels (None if streamed)."""

    source: str
    classes: int
    train: int
    val: int
    test: int
    sha256: str | None


class Session(TypedDict):
    """An uninterrupted stretch of a run's training. A resumed run has several."""

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
        val_accuracy: of the tested weights; NaN without validation images.
        tested_epoch, tested_step: after which the tested weights were saved. Epochs count from 1.
        partial: the settings with which the run skipped images, such as "fast_dev_run=True"; None: it skipped none.
        test_accuracy_one_view: without test-time augmentation.
        seconds: of training batches; `fit_seconds` is until the first one.
        precision, hardware, versions, git_commit: of the last session. The keys of `hardware` are device, name,
            threads, system, and ranks if there were several.
        config: as composed, with `${…}`; in `resolved`, these are replaced.
        history: the metrics of each epoch; `within_epochs` are validations before an epoch's end.
            A value that was not finite is None when the file is read.
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
    hardware: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    sessions: list[Session]
    data: Data
    finished: str
    overrides: list[str]
    config: dict[str, Any]
    resolved: dict[str, Any]
    history: Sequence[Mapping[str, float | None]]
    within_epochs: Sequence[Mapping[str, float | None]]

    def numbers(self) -> dict[str, float]:
        """The finite numbers of the record, by which runs can be compared."""
        return {name: getattr(self, name) for name in NUMBERS if math.isfinite(getattr(self, name))}


NUMBERS = tuple(name for name, hint in get_type_hints(Record).items() if hint in (int, float))
