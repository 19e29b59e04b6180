"""The settings of the commands that use a trained network: types, ranges, and composition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from omegaconf import DictConfig

from cifarnet import cli
from cifarnet.schema import Range, Seed, check_settings
from cifarnet.system import hardware


@dataclass
class Settings:
    """The settings in `configs/evaluate.yaml`, `audit.yaml`, `predict.yaml`, `export.yaml` and `demo.yaml`, without
    `data`."""

    # the network and how it predicts; test-time augmentation and temperature are checked by `Trained`
    classes: list[str]
    tta: str | None
    tta_share: Annotated[float, Range(0, 1)] | None
    temperature: float | str | None
    precision: str | int | None
    accelerator: str
    seed: Seed
    # evaluate
    corruptions: bool
    cifar10_c: str | None
    cifar10_1: str | None
    cifar10h: str | None
    soup: bool
    alpha: Annotated[float, Range(above=0, below=1)]
    ood: str | list[str] | None
    attack: Literal["pgd", "autoattack"] | None
    attack_images: Annotated[int, Range(1)]
    attack_steps: Annotated[int, Range(1, 10**6)]
    attack_restarts: Annotated[int, Range(1, 10**6)]
    features: bool
    output_dir: str | None
    # audit
    count: Annotated[int, Range(0)] | None
    duplicates: Annotated[int, Range(0)]
    # predict
    top: Annotated[int, Range(1)] | None
    output: str | None
    explain: bool
    conformal: Annotated[float, Range(above=0, below=1)] | None
    batch_size: Annotated[int, Range(1, 10**6)]
    workers: Annotated[int, Range(1, 512)] | None
    # export
    format: str
    images: Annotated[int, Range(1)]
    tolerance: Annotated[float, Range(0, 100)]
    # demo
    host: str
    port: Annotated[int, Range(1, 65535)] | None
    upload_limit: Annotated[float, Range(above=0, most=10_000)]
    pictures: Annotated[int, Range(0, 1000)]


def prepare(command: str, overrides: Sequence[str]) -> DictConfig:
    """Compose and check the settings of a command, and suppress messages of libraries.

    The settings are those of `configs/<command>.yaml`, without the section `data` (see `test_images`).

    Raises:
        UserError: a setting has a wrong type or is out of range.
    """
    config = cli.compose(command, overrides)
    cli.check_keys(command, config)
    check_settings(config, Settings)
    from cifarnet.system.log_output import quiet_libraries  # imports Lightning and TensorBoard, which takes seconds

    quiet_libraries()
    hardware.keep_freed_memory()
    return config


def without_data(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those of the data, such as `data=folder` and `data.root=pictures`."""
    return [override for override in overrides if cli.key_of(override).partition(".")[0] != "data"]
