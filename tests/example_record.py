"""A complete record of a run, for tests that read `metrics.json`."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

RECORD: dict[str, Any] = {
    "name": "quickstart",
    "val_accuracy": 0.9,
    "tested_epoch": 4,
    "tested_step": 280,
    "test_accuracy": 0.9,
    "test_cross_entropy": 0.02,
    "partial": None,
    "tta": "none",
    "test_accuracy_one_view": 0.9,
    "epochs": 4,
    "fit_seconds": 1.0,
    "seconds": 13.0,
    "test_seconds": 0.1,
    "compile_seconds": 0,
    "images_per_second": 2700.0,
    "parameters": 37426,
    "seed": 0,
    "precision": "32-true",
    "hardware": {"device": "cpu", "name": "A processor", "threads": 2, "system": "Linux"},
    "versions": {"python": "3.11", "torch": "2.15.0"},
    "git_commit": "a020c70c05f7975ba2ad323737012e0cef72fd69",
    "data": {"source": "Synthetic", "classes": 10, "train": 9000, "val": 1000, "test": 2000, "sha256": "d01fbde4" * 8},
    "finished": "2026-11-22T15:00",
    "overrides": [],
    "config": {
        "data": {"_target_": "cifarnet.data.Synthetic", "root": "data", "split_seed": 0, "shuffle_seed": "${seed}"},
        "model": {"_target_": "cifarnet.models.CNN", "widths": [32, 64], "hidden": 512},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01},
        "scheduler": {"max_lr": "${optimizer.lr}"},
        "module": {"seed": "${seed}"},
        "callbacks": {
            "progress": {"_target_": "cifarnet.callbacks.progress_bar.ProgressBar"},
            "best": {"dirpath": "${output_dir}/checkpoints", "monitor": "val/accuracy"},
        },
        "trainer": {"precision": "auto"},
        "threads": None,
    },
    "resolved": {"data": {"root": "data"}},
    "history": [],
    "within_epochs": [],
}


def session(**changes: Any) -> dict[str, Any]:
    """A session of the example's training."""
    same = {key: RECORD[key] for key in ("precision", "hardware", "versions", "git_commit")}
    return deepcopy({"from_step": 0, **same, "started": "2026-11-22T14:00"} | changes)


def write_record(folder: Path, **changes: Any) -> Path:
    """Write the example with changes as the `metrics.json` of a folder, and return the folder.

    A key such as "config.optimizer.lr" changes a value within a section.
    """
    record = deepcopy(RECORD)
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = record
        for section in sections:
            node = node[section]
        node[last] = value
    last = {key: record[key] for key in ("precision", "hardware", "versions", "git_commit")}
    record.setdefault("sessions", [session(**last)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder
