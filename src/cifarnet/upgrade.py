"""Checkpoints of version 0.1 in today's words."""

import re
from collections.abc import Callable
from typing import Any

from packaging.version import Version

MOVED = {
    "cifarnet.module.Classifier": "cifarnet.classifier.Classifier",
    "cifarnet.muon.Muon": "cifarnet.optim.Muon",
    "cifarnet.callbacks.History": "cifarnet.runs.progress.History",
    "cifarnet.callbacks.ProgressBar": "cifarnet.runs.progress.ProgressBar",
    "cifarnet.callbacks.Pictures": "cifarnet.runs.pictures.Pictures",
    "cifarnet.callbacks.StopOnSignal": "cifarnet.runs.stopping.StopOnSignal",
    "cifarnet.callbacks.Freeze": "cifarnet.recipes.freeze.Freeze",
}
WEIGHTS = {"network.classifier.1.": "network.hidden.1.", "network.classifier.4.": "network.head."}  # of the CNN


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint in place if version 0.1 wrote it: names of classes and weights, and where settings lie.

    Raises:
        Exception: of whatever type, where it is damaged.
    """
    hparams = checkpoint["hyper_parameters"]
    if Version(hparams["cifarnet"]) >= Version("0.2.dev0"):
        return
    config, model = hparams["config"], hparams.pop("model")
    folder = str(config.get("output_dir") or "nowhere")  # which its callbacks and loggers name
    inside = re.compile(rf"^{re.escape(folder)}(?=/|$)")
    config = _renamed(config, lambda text: MOVED.get(text, inside.sub("${output_dir}", text)))
    config["model"] = {**config["model"], "_target_": model["_target_"]}
    smoothing = config["module"].pop("label_smoothing", 0.0)
    for key in ("channels_last", "seed"):  # said once, at the root
        config["module"].pop(key, None)
    for name in ("history", "pictures"):
        ((config.get("callbacks") or {}).get(name) or {}).pop("dirpath", None)
    cross_entropy = {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": smoothing, "reduction": "none"}
    config |= {"objective": cross_entropy, "recipe": {}, "output_dir": None, "ckpt_path": None, "classes": []}
    config.pop("total_steps", None)
    config["trainer"].pop("default_root_dir", None)  # the run's folder
    hparams |= {"config": config, "image_size": model["image_size"]}
    hparams["precision"] = config["trainer"]["precision"]
    if model["_target_"].startswith("cifarnet.models.") and model["_target_"].endswith(".CNN"):
        checkpoint["state_dict"] = _moved(checkpoint["state_dict"])


def _moved(weights: dict[str, Any]) -> dict[str, Any]:
    """A model's weights by their new names, in their old order."""
    names = {old: new for name in weights for old, new in WEIGHTS.items() if name.startswith(old)}
    moved = {}
    for name, weight in weights.items():
        old = next((old for old in names if name.startswith(old)), "")
        moved[names.get(old, "") + name.removeprefix(old)] = weight
    return moved


def _renamed(node: Any, change: Callable[[str], str]) -> Any:
    """A config with every text in it changed."""
    if isinstance(node, dict):
        return {key: _renamed(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(value, change) for value in node]
    return change(node) if isinstance(node, str) else node
