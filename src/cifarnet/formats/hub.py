"""A folder as Hugging Face's hub has them: the weights, the settings, and a model card written from the run's records.

Pushing it is the user's, with their own client: `hf upload <user>/<name> <folder>`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, PyTorchModelHubMixin
from jinja2 import StrictUndefined, Template
from torch import Tensor, nn

import cifarnet
from cifarnet import checkpoint, cli
from cifarnet.errors import UserError, printable
from cifarnet.evaluation import report
from cifarnet.evaluation.trained import Trained
from cifarnet.runs.record import aligned, parameters

FILE = "hub"
TITLE = "classifier"  # of a run whose record is not there


class HubNetwork(nn.Module, PyTorchModelHubMixin, library_name="cifarnet", tags=["image-classification"]):
    """A network of this project that Hugging Face's client saves, and loads by its name on the hub.

    `settings` are those in `config.json`: model, class_names, image_size, cifarnet, precision, tta and epoch are what
    `cifarnet.load` needs. A class that the model names must be one of this project.

    Shapes: images [B, C, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].
    """

    def __init__(self, *, network: nn.Module | None = None, **settings: Any) -> None:
        super().__init__()
        if network is None:
            classes, size = len(settings["class_names"]), settings["image_size"]
            network = checkpoint.untrained(settings["model"], classes, size, "config.json")
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder: `model.safetensors`, `config.json`, and the card as `README.md`."""
    settings = {"model": classifier.model, **classifier.tested, **facts}
    path.mkdir()
    path.joinpath("README.md").write_text(card(classifier), "utf-8")
    HubNetwork(network=classifier.network).save_pretrained(path, config=settings)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    return cifarnet.load(path).network


def card(classifier: Trained) -> str:
    """The model card: what it is, how it was trained and measured, how to use it. Whatever stems from a record stands
    in blocks of code, where neither HTML nor Markdown means anything.

    Raises:
        UserError: a record is damaged.
    """
    record, evaluation, results = classifier.record(), classifier.evaluation(), []
    trained, measured = {}, {}
    try:
        if record:
            data, hardware = record["data"], record["hardware"]
            trained = {
                "command": " ".join(["python -m cifarnet.train", *typed(record["overrides"])]),
                "data": f"{data['source']}: {data['train']:,} images to train, {data['val']:,} to validate",
                "seed": str(record["seed"]),
                "epochs": f"{record['epochs']} (the weights are those after epoch {record['tested_epoch']})",
                "time": f"{record['seconds']:.0f} s, {record['images_per_second']:,.0f} images/s",
                "hardware": f"{hardware['name']}, {record['precision']}",
                "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
                "commit": str(record["git_commit"]),
            }
            one_view = f"; {record['test_accuracy_one_view']:.2%} without tta={record['tta']}"
            views = "" if record["tta"] == "none" else one_view
            measured = {"test accuracy": f"{record['test_accuracy']:.2%}  ({data['test']:,} images{views})"}
            metric = {"metric_type": "accuracy", "metric_name": "accuracy, of one view"}
            task = {"task_type": "image-classification", "dataset_type": data["source"], "dataset_name": data["source"]}
            results = [EvalResult(metric_value=record["test_accuracy_one_view"], **task, **metric)]
        if evaluation:
            measured = report.rows(evaluation)
        head = ModelCardData(
            library_name="cifarnet",
            pipeline_tag="image-classification",
            tags=["image-classification", "pytorch"],
            model_name=printable(str(record.get("name") or TITLE)),
            eval_results=results or None,
        ).to_yaml()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"A record of {classifier.path} is damaged ({type(error).__name__}: {error}).") from error
    text = Path(__file__).with_name("card.md.jinja").read_text("utf-8")
    spacing = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Template(text, undefined=StrictUndefined, **spacing).render(
        head=head,
        network=type(classifier.network).__name__,
        parameters=parameters(classifier.network),
        classes=block(", ".join(classifier.class_names)),
        image_size=classifier.image_size,
        model=block(json.dumps(classifier.model, indent=1)),
        measured=block(aligned(measured)) if measured else "",
        evaluated=bool(evaluation),
        trained=block(aligned(trained)) if trained else "",
        version=cifarnet.__version__,
    )


def typed(overrides: Sequence[str]) -> list[str]:
    """What was typed to start a run, but for places on its machine, which are nobody else's business."""
    return [f"{cli.key_of(one)}=…" if re.search(r"=.*[/\\]", one) else one for one in map(str, overrides)]


def block(text: str) -> str:
    """Lines of text in a fence that nothing in them can end."""
    lines = [printable(line) for line in text.replace("`", "'").strip("\n").split("\n")]
    return "\n".join(["```text", *lines, "```"])
