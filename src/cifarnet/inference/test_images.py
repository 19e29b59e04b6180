"""The images on which a trained network is tested: the test images of its run, or others that the user chooses.

A checkpoint provides only the class of its data set and numbers, such as `val_fraction`. Paths and URLs are not used.
Nothing is downloaded or cached unless the user chooses the data with `data=`.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cifarnet import build, cli
from cifarnet.allowlist import allowed_class, class_path, locate
from cifarnet.checkpoint import Checkpoint
from cifarnet.config import check_sections
from cifarnet.data import CIFAR10, ImageDataModule, Split
from cifarnet.errors import NoImages
from cifarnet.schema import accepts

SPLIT = ("val_fraction", "split_seed", "batch_size", "eval_batch_size")  # settings that also apply to other data sets
UNUSED = ("imbalance", "train_share", "images_per_class", "label_noise", "read_only")  # those of the run do not apply


def compose(command: str, overrides: Sequence[str], checkpoint: Checkpoint, classes: Sequence[str]) -> DictConfig:
    """Compose `configs/<command>.yaml` with the data of the checkpoint's run, unless the overrides choose other data.

    The settings that select training images or change their labels do not apply to a test. If the overrides choose
    another data set, only the settings of the validation split remain.

    Args:
        classes: names of data classes from outside this project that the checkpoint may name.

    Raises:
        NoImages: the checkpoint does not specify its data, or the folder of the images is unknown.
        UserError: a setting of the data cannot be used.
    """
    keys = [cli.key_of(override) for override in overrides]
    names = [key for key in checkpoint.data if key.isidentifier() and key[0] != "_" and key not in UNUSED]
    data = {key: json.dumps(checkpoint.data[key]) for key in names}
    data["batch_size"] = "1"  # without training, the training set may be smaller than a batch
    if "data" in keys:
        is_same = OmegaConf.select(cli.compose(command, overrides), "data._target_") == checkpoint.data.get("_target_")
        data = {key: value for key, value in data.items() if is_same or key in SPLIT}
    elif not checkpoint.data:
        raise NoImages(f"{checkpoint.path} does not specify its data. Choose data=cifar10, or data=folder data.root=…")
    else:
        data_class = allowed_class(checkpoint.data.get("_target_"), "cifarnet.data", checkpoint.path, locate(classes))
        arguments = inspect.signature(data_class).parameters
        root = arguments.get("root")
        if root is not None and "data.root" not in keys and not Path(str(root.default)).is_dir():
            remedy = " ".join(f"data.{name}=…" for name in ("name", "root", "arguments") if name in arguments)
            if issubclass(data_class, CIFAR10):
                remedy = f"data={data_class.__name__.lower()} to download them, or data.root=…"
            raise NoImages(f"{checkpoint.path} does not contain the path of its images. Add {remedy}.")
        data["_target_"] = class_path(data_class)
        data |= {"read_only": "true"} if accepts(data_class, "read_only") else {}
        overrides = [f"++{override}" if override.startswith("data.") else override for override in overrides]
    config = cli.compose(command, [*(f"++data.{key}={value}" for key, value in data.items()), *overrides])
    check_sections(config)
    return config


def load(command: str, overrides: Sequence[str], checkpoint: Checkpoint, classes: Sequence[str]) -> ImageDataModule:
    """Return the data to test a network on. See `compose` for the arguments and other errors.

    Raises:
        UserError: the data cannot be read, or has other classes or another image size than the network.
    """
    data = build.make_data(compose(command, overrides, checkpoint, classes))
    checkpoint.check_task(data.class_names, data.image_size)
    return data


def sample(split: Split, most: int) -> tuple[Tensor, list[int]]:
    """Return at most `most` images of a split, uint8 [N, C, H, W], and their labels.

    The images are taken at regular intervals after sorting by class, so that all classes are represented.
    """
    chosen = split[split.labels.argsort(stable=True)[:: -(-len(split) // most)]]
    return next(chosen.chunks(most)).contiguous(), chosen.labels.tolist()
