"""Measure a trained network: accuracy, calibration, mistakes, robustness; as one HTML page."""

import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import printable
from cifarnet.schema import Range, Seed
from cifarnet.system import files

EXAMPLES = """  python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
  python -m cifarnet.evaluate <run> tta=mirror corruptions=false
  python -m cifarnet.evaluate <run> data=folder data.root=pictures     other images of the same classes
  python -m cifarnet.evaluate <run> cifar10_c=CIFAR-10-C cifar10_1=CIFAR-10.1 cifar10h=cifar10h-probs.npy
"""
TYPES = dict.fromkeys(("tta", "cifar10_c", "cifar10_1", "cifar10h", "output_dir"), str | None)
TYPES |= {"tta_share": float | None, "precision": str | int | None, "accelerator": str}
TYPES |= {"corruptions": bool, "seed": int, "classes": list[str]}
RANGES = {"tta_share": Annotated[float, Range(0, 1)], "seed": Seed}


def evaluate(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a checkpoint, and write `report.html`, its figures and `metrics.json` into its folder `evaluation`.

    Args:
        path: a run's folder or a checkpoint file.
        overrides: of `configs/evaluate.yaml`, such as "tta=mirror".

    Returns:
        What `metrics.json` holds. Accuracies are from 0 to 1.

    Raises:
        UserError: the checkpoint, a setting or the data cannot be used; the message says what to do.
    """
    from cifarnet import checkpoint

    path = checkpoint.find(path)
    content = checkpoint.read(path)

    from cifarnet import build
    from cifarnet.evaluation import public_sets, report, sections, training
    from cifarnet.evaluation.figures import light_and_dark
    from cifarnet.inference.predictor import Predictor
    from cifarnet.records.collect import num_parameters
    from cifarnet.records.figures import accuracy
    from cifarnet.records.json_file import write_json
    from cifarnet.records.tables import row_table
    from cifarnet.system import hardware  # these take seconds more: a wrong path is told before
    from cifarnet.system.log_output import quiet_libraries

    quiet_libraries()
    hardware.keep_freed_memory()
    config = configure(content, path, overrides)
    network, class_names = checkpoint.network(content, path, locate(config.classes))
    datamodule = build.make_data(config)
    checkpoint.check_same_task(content["hyper_parameters"], datamodule.class_names, datamodule.image_size)
    public = public_sets.read(datamodule, config.cifar10_c, config.cifar10_1, config.cifar10h)
    asked = arithmetic(content, config)
    channels_last = content["resolved"].get("channels_last", True)
    predictor = Predictor(network, **asked, channels_last=channels_last, accelerator=config.accelerator)
    folder = make_folder(config.output_dir, path)

    record: dict[str, Any] = {
        "checkpoint": str(path),
        "network": type(network).__name__,
        "parameters": num_parameters(network),
        "epoch": content["epoch"] + 1,
        "class_names": class_names,
        **asked,
        "data": datamodule.describe(),
        "training_settings": training.settings(content),
        "hardware": hardware.describe(predictor.device),
        "versions": hardware.versions(),
        "git_commit": hardware.git_commit(),
        "command": shlex.join(["python", "-m", "cifarnet.evaluate", str(path), *overrides]),
        "config": OmegaConf.to_container(config, resolve=True),
    }
    print(printable(report.heading(record)), flush=True)
    measured, drawn = sections.measure(predictor, datamodule, public, config.seed if config.corruptions else None)
    record |= measured | {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}

    if epochs := training.history(content, path):
        drawn["accuracy"] = partial(accuracy, epochs)
    pictures = {name: light_and_dark(draw) for name, draw in drawn.items()}
    for name, (light, _) in pictures.items():
        files.write(folder / f"{name}.png", light)
    write_json(record, folder / "metrics.json")
    files.write(folder / "report.html", report.render(record, pictures))
    print(printable(row_table({**report.rows(record), "report": os.path.relpath(folder / "report.html")})))
    return record


def configure(content: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> DictConfig:
    """`configs/evaluate.yaml`, with the checkpoint's own data unless other data are chosen."""
    from cifarnet.inference import test_images

    return test_images.configure("evaluate", content, path, overrides, TYPES, RANGES)


def arithmetic(content: Mapping[str, Any], config: DictConfig) -> dict[str, Any]:
    """Precision and test-time augmentation: as in the run's own test, but for what is set."""
    from cifarnet.inference.trained import as_tested

    saved = as_tested(content)
    return saved | {key: config[key] for key in saved if config[key] is not None}


def make_folder(output_dir: str | None, path: Path) -> Path:
    """`output_dir`, else a folder in the run's own, or beside a checkpoint that was moved out of it."""
    from cifarnet.inference.trained import folder_for

    folder = folder_for(path, "evaluation") if output_dir is None else Path(output_dir)
    if output_dir is None:
        files.refuse_links(folder.parent, [folder])
    files.make_folder(folder, f"output_dir={folder} cannot be made")
    return folder


def _command() -> None:
    evaluate(*cli.parse_one("evaluate", __doc__, EXAMPLES))


def main() -> None:
    """The command `python -m cifarnet.evaluate`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
