"""Measure a trained network: accuracy, calibration, mistakes, robustness.

python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
"""

import argparse
import os
import pydoc
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.train import quieten_lightning

if TYPE_CHECKING:  # torch and lightning take seconds to import: `--help` does without
    from cifarnet.data import ImageDataModule

SPLITTING = ("val_fraction", "split_seed", "eval_batch_size")  # another data set is split and batched as the run's was
TYPES = {"accelerator": str, "classes": list[str], "corruptions": bool, "seed": int, "tta_share": float | None}
EXAMPLES = """examples:
  python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
  python -m cifarnet.evaluate <run> tta=mirror corruptions=false
  python -m cifarnet.evaluate <run> data=folder data.root=pictures     other images of the same classes
  python -m cifarnet.evaluate <run> cifar10_c=CIFAR-10-C cifar10_1=CIFAR-10.1 cifar10h=cifar10h-probs.npy

settings:
"""


def evaluate(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a checkpoint, and write `report.html`, its pictures and `metrics.json` into its folder `evaluation`.

    Args:
        path: a run's folder or a checkpoint file.
        overrides: of `configs/evaluate.yaml`, such as "tta=mirror".

    Returns:
        What `metrics.json` holds. Accuracies are from 0 to 1.

    Raises:
        UserError: the checkpoint, a setting or the data cannot be used; the message says what to do.
    """
    from cifarnet import checkpoint, cpu, measure, page, results
    from cifarnet.inference import Predictor

    quieten_lightning()
    cpu.keep_freed_memory()
    path = checkpoint.find(path)
    content = checkpoint.read(path)
    recipe = content["hyper_parameters"]
    config = settings(recipe, overrides, path)
    own = [own_class(name) for name in config.classes]
    network, class_names = checkpoint.build(content, path, own)
    datamodule = read_data(config, overrides, path, own)
    check_same_task(recipe, class_names, datamodule)
    public = read_public(config, datamodule)
    predictor = Predictor(network, **arithmetic(recipe, config))
    folder = make_folder(config.output_dir, path)

    metrics: dict[str, Any] = {
        "checkpoint": str(path),
        "network": type(network).__name__,
        "parameters": results.parameters(network),
        "epoch": content["epoch"] + 1,
        "class_names": class_names,
        "tta": predictor.tta,
        "tta_share": predictor.tta_share,
        "precision": predictor.precision,
        "data": datamodule.describe(),
        "hardware": results.hardware(predictor.device),
        "versions": results.versions(),
        "git_commit": results.git_commit(),
        "command": shlex.join(["python", "-m", "cifarnet.evaluate", str(path), *overrides]),
        "config": OmegaConf.to_container(config, resolve=True),
    }
    print(page.heading(metrics), flush=True)
    batch_size = datamodule.eval_batch_size
    figures, pictures = measure.on_test_images(predictor, datamodule, public.get("cifar10h"))
    metrics |= figures | {"corruptions": None, "cifar10_c": None, "cifar10_1": None}
    if config.corruptions:
        clean = metrics["test"]["accuracy"]
        metrics["corruptions"], more = measure.corruptions(predictor, datamodule, config.seed, clean)
        pictures |= more
    if "cifar10_c" in public:
        metrics["cifar10_c"], more = measure.cifar10_c(predictor, public["cifar10_c"], batch_size)
        pictures |= more
    if "cifar10_1" in public:
        metrics["cifar10_1"] = measure.cifar10_1(predictor, public["cifar10_1"], batch_size)
    metrics["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")

    files = {name: folder / f"{name}.png" for name in pictures}
    for name, file in files.items():
        pictures[name].savefig(file)
    results.write(metrics, folder / "metrics.json")
    html = page.render(metrics, {name: file.read_bytes() for name, file in files.items()})
    results.write_whole(folder / "report.html", html)
    print(results.aligned({**page.rows(metrics), "report": os.path.relpath(folder / "report.html")}))
    return metrics


def settings(recipe: Mapping[str, Any], overrides: Sequence[str], path: Path) -> DictConfig:
    """`configs/evaluate.yaml`, with the checkpoint's own data as the choice `data=checkpoint`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    saved = {key: value for key, value in recipe["config"]["data"].items() if key != "url"}  # a stranger's
    kept = ["++data.batch_size=1"]  # nothing is trained: a small data set will do
    if "data" in map(cli.key_of, overrides):
        kept += [f"++data.{key}={saved[key]}" for key in SPLITTING if isinstance(saved.get(key), int | float)]
    else:
        check_plain(saved, path)
        ConfigStore.instance().store(group="data", name="checkpoint", node=dict(saved))
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        config = compose("evaluate", [*kept, *overrides])
    for key, hint in TYPES.items():
        cli.check_type(key, config[key], hint)
    return config


def check_plain(saved: Mapping[str, Any], path: Path) -> None:
    """Refuse settings of a checkpoint that Hydra would take for more than names and values."""
    for key, value in saved.items():
        members = value if isinstance(value, list) else [value]
        plain = all(member is None or isinstance(member, bool | int | float | str) for member in members)
        known = key == "_target_" or not (str(key).startswith("_") or key == "defaults")
        if not (plain and known) or "${" in str(value):
            raise UserError(
                f"{path}: its setting data.{key}={value} is no plain value, and is not used. "
                "Say what to test on: data=cifar10, or data=folder data.root=…"
            )


def own_class(name: str) -> type:
    """A class that the user, not the checkpoint, names."""
    try:
        found = pydoc.locate(str(name))
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"classes: {name} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise UserError(f"classes: there is no class {name}. Give it as classes=[module.Class].")
    return found


def read_data(config: DictConfig, overrides: Sequence[str], path: Path, own: Sequence[type]) -> "ImageDataModule":
    """The images. A class that the user names may be any; one that the checkpoint asks for must be listed."""
    from hydra.utils import instantiate

    from cifarnet.checkpoint import class_path, listed
    from cifarnet.data import CIFAR10, ImageFolder, Synthetic

    if "_target_" not in config.data:
        raise UserError("data names nothing to build (no _target_). Choose data=cifar10, or data=folder data.root=…")
    if not {"data", "data._target_"} & set(map(cli.key_of, overrides)):
        config.data._target_ = class_path(listed(config.data, (CIFAR10, ImageFolder, Synthetic, *own), path))
    cli.check_types(config)
    datamodule: ImageDataModule = instantiate(config.data)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def check_same_task(recipe: Mapping[str, Any], class_names: Sequence[str], datamodule: "ImageDataModule") -> None:
    """Refuse images of other classes, or of another size, than the network was trained on."""
    if list(datamodule.class_names) != list(class_names):
        raise UserError(
            f"The data has the classes {', '.join(datamodule.class_names)}; the network knows "
            f"{', '.join(class_names)}. Give data of these classes, in folders of these names."
        )
    trained_on = recipe["model"].get("image_size")
    if datamodule.image_size != trained_on:
        raise UserError(
            f"The images are {datamodule.image_size} pixels wide; the network was trained on {trained_on}. "
            f"For a folder: data.image_size={trained_on}"
        )


def read_public(config: DictConfig, datamodule: "ImageDataModule") -> dict[str, Any]:
    """The public test sets that are asked for, before anything is measured."""
    from cifarnet import robustness
    from cifarnet.data import CIFAR10

    task = datamodule.class_names, datamodule.image_size
    public: dict[str, Any] = {}
    if config.cifar10_c is not None:
        public["cifar10_c"] = robustness.read_cifar10_c(config.cifar10_c, *task)
    if config.cifar10_1 is not None:
        public["cifar10_1"] = robustness.read_cifar10_1(config.cifar10_1, *task)
    if config.cifar10h is not None:
        if not isinstance(datamodule, CIFAR10):
            raise UserError(
                f"cifar10h={config.cifar10h} goes by the official order of CIFAR-10's test images, which "
                f"{type(datamodule).__name__} does not have. Use data=cifar10 data.root=<the archive's folder>."
            )
        public["cifar10h"] = robustness.read_cifar10h(config.cifar10h, len(datamodule.source.test))
    return public


def arithmetic(recipe: Mapping[str, Any], config: DictConfig) -> dict[str, Any]:
    """How the network is to be asked: as in the run's own test, but for what is set."""
    module, trainer = recipe["config"]["module"], recipe["config"]["trainer"]
    saved = {"tta": module.get("tta", "none"), "tta_share": module.get("tta_share", 1.0)}
    saved |= {"precision": trainer["precision"]}
    chosen = {key: config[key] for key in saved if config[key] is not None}
    return {**saved, **chosen, "channels_last": module.get("channels_last", True), "accelerator": config.accelerator}


def make_folder(output_dir: str | None, path: Path) -> Path:
    """`output_dir`, else a folder in the run's own, or beside a checkpoint that was moved out of it."""
    default = path.with_name(f"{path.stem}_evaluation")
    if path.parent.name == "checkpoints":
        default = path.parent.parent / "evaluation"
    folder = default if output_dir is None else Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={folder} cannot be made ({error.strerror}). Choose another.") from error
    return folder


def _command() -> None:
    listing = (cli.CONFIGS / "evaluate.yaml").read_text("utf-8").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m cifarnet.evaluate",
        description="Measure a trained network: accuracy, calibration, mistakes, robustness; as one HTML page.",
        epilog=EXAMPLES + "\n".join(f"  {line}" for line in listing[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a run's folder (its best checkpoint) or a checkpoint file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    arguments = parser.parse_args(sys.argv[1:])
    evaluate(arguments.checkpoint, arguments.settings)


def main() -> None:
    """The command `python -m cifarnet.evaluate`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
