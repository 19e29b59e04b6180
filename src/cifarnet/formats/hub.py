"""A folder as Hugging Face's hub has them: the weights, the settings, and a model card written from the run's records.

Pushing it is the user's, with their own client: `hf upload <user>/<name> <folder>`.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, PyTorchModelHubMixin
from jinja2 import StrictUndefined, Template
from torch import Tensor, nn

import cifarnet
from cifarnet import checkpoint, cli
from cifarnet.errors import UserError, printable
from cifarnet.evaluation import metrics, report
from cifarnet.inference.trained import Trained
from cifarnet.records.collect import num_parameters
from cifarnet.records.tables import row_table

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
    settings = {"model": shown_model(classifier), **classifier.tested, **facts, "evaluation": fitted(classifier)}
    path.mkdir()
    path.joinpath("README.md").write_text(card(classifier), "utf-8")
    HubNetwork(network=classifier.network).save_pretrained(path, config=settings)
    shutil.copymode(path / "README.md", path / checkpoint.SHARED[0])  # who may read one may read the other


def fitted(classifier: Trained) -> dict[str, Any] | None:
    """The temperature that evaluate fitted, and with which test-time augmentation; None where it did not."""
    evaluation = classifier.evaluation()
    if evaluation.get("temperature") is None:
        return classifier.shared_evaluation() or None
    return {key: evaluation[key] for key in ("tta", "temperature")}


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    return cifarnet.load(path, classes).network


def card(classifier: Trained) -> str:
    """The model card: what it is, how it was trained and measured, how to use it. Whatever stems from a record stands
    in blocks of code, where neither HTML nor Markdown means anything.

    Raises:
        UserError: a record is damaged.
    """
    record, evaluation = classifier.record(), classifier.evaluation()
    trained, measured, results = {}, {}, []
    try:
        if record:
            trained, measured, results = told(record)
        if evaluation:
            data = evaluation["data"]
            measured = {"on": f"{data['source']}, with tta={evaluation['tta']}, in {evaluation['precision']}"}
            measured |= report.rows(evaluation)
        head = ModelCardData(
            library_name="cifarnet",
            pipeline_tag="image-classification",
            tags=["image-classification", "pytorch"],
            model_name=printable(str(record.get("name") or TITLE)),
            eval_results=results or None,
        ).to_yaml()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"A record of {classifier.path} is damaged ({type(error).__name__}: {error}).") from error
    text = Path(__file__).with_name("card.md.jinja").read_text("utf-8")
    spacing = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Template(text, undefined=StrictUndefined, **spacing).render(
        head=head,
        network=type(classifier.network).__name__,
        parameters=num_parameters(classifier.network),
        classes=block(", ".join(classifier.class_names)),
        image_size=classifier.image_size,
        model=block(json.dumps(shown_model(classifier), indent=1)),
        measured=block(row_table(measured)) if measured else "",
        evaluated=bool(evaluation),
        trained=block(row_table(trained)) if trained else "",
        version=cifarnet.__version__,
    )


def told(record: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], list[EvalResult]]:
    """Of a run's record: how it was trained, what it reached, and that again as the hub's tables want it."""
    data, hardware, source = record["data"], record["hardware"], record["data"]["source"]
    trained = {
        "data": f"{source}: {data['train']:,} images to train, {data['val']:,} to validate",
        "seed": str(record["seed"]),
        "epochs": f"{record['epochs']} (the weights are those after epoch {record['tested_epoch']})",
        "time": f"{record['seconds']:.0f} s, {record['images_per_second']:,.0f} images/s",
        "hardware": f"{hardware['name']}, {record['precision']}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "commit": str(record["git_commit"]),
    }
    if record["overrides"]:  # none where it was trained from Python
        trained = {"command": shlex.join(["python", "-m", "cifarnet.train", *typed(record["overrides"])])} | trained
    low, high = metrics.proportion(round(record["test_accuracy"] * data["test"]), data["test"])["interval"]
    images = f"95% interval {low:.2%} to {high:.2%}, {data['test']:,} images"
    if record["tta"] != "none":
        images += f", tta={record['tta']}; {record['test_accuracy_one_view']:.2%} without"
    of_test = {"task_type": "image-classification", "dataset_type": source, "dataset_name": source}
    of_test |= {"metric_type": "accuracy", "metric_name": "accuracy, of one view"}
    results = [EvalResult(metric_value=record["test_accuracy_one_view"], **of_test)]
    return trained, {"test accuracy": f"{record['test_accuracy']:.2%}  ({images})"}, results


def shown_model(classifier: Trained) -> dict[str, Any]:
    """The network's settings, but for the file from which its weights once came."""
    return {key: value for key, value in classifier.model.items() if key != "checkpoint"}


def typed(overrides: Sequence[str]) -> list[str]:
    """What was typed to start a run, but for places on its machine, which are nobody else's business."""
    return [f"{cli.key_of(one)}=…" if re.search(r"=.*[/\\]", one) else one for one in map(str, overrides)]


def block(text: str) -> str:
    """Lines of text in a fence that nothing in them can end."""
    lines = [printable(line) for line in text.replace("`", "'").strip("\n").split("\n")]
    return "\n".join(["```text", *lines, "```"])
