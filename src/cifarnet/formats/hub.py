"""A folder for the Hugging Face Hub: weights, settings, and a model card that is generated from the run's records.

The Hugging Face client uploads it: `hf upload <user>/<name> <folder>`.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template
from safetensors.torch import save
from torch import Tensor

import cifarnet
from cifarnet import cli
from cifarnet.checkpoint import HUB_SETTINGS, HUB_WEIGHTS
from cifarnet.errors import printable
from cifarnet.evaluation import metrics, report
from cifarnet.inference.trained import Trained
from cifarnet.records.collect import num_parameters
from cifarnet.records.tables import percent

FILE = "hub"


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Create the folder with `model.safetensors`, `config.json`, and the model card, `README.md`."""
    calibrations = classifier.calibrations()
    settings = {**facts, **classifier.tested, "model": _model(classifier)}
    settings["evaluation"] = calibrations[-1] if calibrations else None
    weights = {f"network.{name}": weight.clone() for name, weight in classifier.network.state_dict().items()}
    path.mkdir()
    path.joinpath("README.md").write_text(card(classifier), "utf-8")
    path.joinpath(HUB_SETTINGS).write_text(json.dumps(settings, sort_keys=True, indent=2), "utf-8")
    path.joinpath(HUB_WEIGHTS).write_bytes(save(weights, {"format": "pt"}))


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    """Return the network, which takes images and returns logits."""
    return cifarnet.load(path, classes).network


def card(classifier: Trained) -> str:
    """Return the model card: how the network was trained and measured, and how to use it.

    In the template, all values from a record are JSON or in code blocks, where HTML and Markdown have no effect.

    Raises:
        UserError: a record cannot be read.
    """
    record, evaluation = classifier.record(), classifier.evaluation()
    if record and evaluation:
        is_current = evaluation.finished >= record.finished
        evaluation = evaluation if is_current and evaluation.data["sha256"] == record.data["sha256"] else None
    template = Template(
        Path(__file__).with_name("card.md.jinja").read_text("utf-8"),
        finalize=lambda value: printable(str(value)).replace("`", "'"),  # so that no value can end a code block
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return template.render(
        classifier=classifier,
        network=classifier.checkpoint.network_name,
        parameters=num_parameters(classifier.network),
        model=json.dumps(_model(classifier), indent=1),
        record=record,
        overrides=shlex.join(map(without_path, record.overrides)) if record else "",
        evaluation=evaluation,
        results=report.summary(evaluation) if evaluation else None,
        proportion=metrics.proportion,
        percent=percent,
        version=cifarnet.__version__,
    )


def _model(classifier: Trained) -> dict[str, Any]:
    """Return the network's arguments without `checkpoint`, the path of its initial weights."""
    return {key: value for key, value in classifier.checkpoint.model.items() if key != "checkpoint"}


def without_path(override: str) -> str:
    """Return an override, without a value that is a path on the machine that trained, or may be a logger's password."""
    is_hidden = re.search(r"^\W*logger(\.|\b.*\{)|=.*[/\\]", override)
    return f"{cli.key_of(override)}=…" if is_hidden else override
