"""Which images a trained network is put to the test on: those of its own run, or others that the user names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from cifarnet import build, checkpoint, cli
from cifarnet.allowlist import locate
from cifarnet.config import check_own, check_type, check_types
from cifarnet.errors import NoImages, UserError

SPLITTING = ("val_fraction", "split_seed", "eval_batch_size")  # another data set is split and batched as the run's was


def own(
    command: str, overrides: Sequence[str], types: Mapping[str, Any], allowed: Mapping[str, Any]
) -> tuple[DictConfig, bool]:
    """`configs/<command>.yaml` without data, checked; and whether the user names data. For what can do without."""
    of_data = [override for override in overrides if cli.key_of(override).partition(".")[0] == "data"]
    config = cli.compose(command, [override for override in overrides if override not in of_data])
    check_own(config, types, allowed)
    return config, bool(of_data)


def configure(
    command: str,
    content: Mapping[str, Any],
    path: Path,
    overrides: Sequence[str],
    types: Mapping[str, Any],
    allowed: Mapping[str, Any],
) -> DictConfig:
    """`configs/<command>.yaml`, checked, with the checkpoint's own data unless other data are chosen.

    Args:
        content: what `checkpoint.read` returned for `path`.
        types, allowed: of the command's settings, for those that have one; the range of numbers.

    Raises:
        UserError: a setting cannot be used, or the checkpoint asks for data that it may not name, or that are not here.
    """
    recorded = content["resolved"]["data"]
    if "data" in map(cli.key_of, overrides):
        saved = {key: recorded[key] for key in SPLITTING if isinstance(recorded.get(key), int | float)}
    elif not recorded:
        raise NoImages(
            f"{path} does not say what it was trained on. Say what to test on: data=cifar10, or data=folder …"
        )
    else:
        named = [override for override in overrides if cli.key_of(override) == "classes"]
        given = {cli.key_of(override).removeprefix("data.") for override in overrides}
        classes = cli.compose(command, named).classes
        check_type("classes", classes, types["classes"])
        saved = checkpoint.check_data(content, path, locate(classes), given)
        if "url" in recorded:
            saved["url"] = None  # no address of a stranger's; the user may give one
    saved["batch_size"] = 1  # nothing is trained: a small data set will do
    config = cli.compose(command, [*(f"++data.{key}={plain(value)}" for key, value in saved.items()), *overrides])
    check_own(config, types, allowed)
    if "_target_" not in (config.get("data") or {}):
        raise UserError("data names nothing to build (no _target_). Choose data=cifar10, or data=folder data.root=…")
    check_types(config)
    return config


def some(config: DictConfig, content: Mapping[str, Any], most: int) -> tuple[Tensor, list[int]]:
    """At most so many test images, uint8 [N, C, H, W], and their labels, taken evenly: a folder's lie class by class.

    Raises:
        UserError: the data cannot be read, or has other classes, or images of another size, than the network knows.
    """
    data = build.make_data(config)
    checkpoint.check_same_task(content["hyper_parameters"], data.class_names, data.image_size)
    split = data.source.test
    places = slice(None, None, -(-len(split) // most))
    images = split.images[places]
    images = images if isinstance(images, Tensor) else images.read()
    return images.contiguous(), split.labels[places].tolist()


def plain(value: Any) -> str:
    """A value, or a list of them, as an override says it: Hydra sees but a value, whoever chose it."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    return cli.literal(value) if isinstance(value, str) else json.dumps(value)
