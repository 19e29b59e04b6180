"""How a network was trained, for the page: settings and learning curve, as its checkpoint and its run's record say."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cifarnet.config import deciding_settings, flat

LARGEST = 10**6  # an epoch or a metric beyond it is damage, and nothing to draw


def settings(content: Mapping[str, Any]) -> dict[str, str]:
    """Those on which figures and times depend; without the number of steps, which no config knows."""
    written = flat(content["hyper_parameters"]["config"])
    unknown = {key for key, text in written.items() if key == "total_steps" or "${total_steps}" in text}
    return {key: text for key, text in deciding_settings(content["resolved"], times=True).items() if key not in unknown}


def history(content: Mapping[str, Any], path: Path) -> list[dict[str, float]]:
    """The metrics of each epoch: of the whole run where it has ended, else as far as the checkpoint knows.

    Args:
        content: of the checkpoint, as `checkpoint.read` gives it.
        path: of its file.
    """
    found: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.parent.name == "checkpoints":
            found = json.loads(path.parent.with_name("metrics.json").read_text("utf-8"))
    callbacks = content.get("callbacks")
    kept = callbacks.get("History") if isinstance(callbacks, Mapping) else None
    for place, rows, more in [(found, "history", "within_epochs"), (kept, "epochs", "validations")]:
        if isinstance(place, Mapping) and (epochs := list(_rows(place.get(rows)))):
            within = [row for row in _rows(place.get(more)) if row["epoch"] % 1]
            return sorted([*epochs, *within], key=lambda row: row["epoch"])
    return []


def _rows(rows: Any) -> Iterator[dict[str, float]]:
    """What can be drawn of rows from a file of whatever origin."""
    for row in rows if isinstance(rows, list) else []:
        cells = row.items() if isinstance(row, Mapping) else []
        numbers = {key: value for key, value in cells if isinstance(value, int | float) and abs(value) < LARGEST}
        if "epoch" in numbers:
            yield numbers
