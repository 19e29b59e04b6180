"""Measure a trained network: accuracy, calibration, mistakes, robustness.

python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifarnet import cli, settings
from cifarnet.errors import UserError

if TYPE_CHECKING:  # torch and lightning take seconds to import: `--help` does without
    from cifarnet.data import ImageDataModule

DESCRIPTION = "Measure a trained network: accuracy, calibration, mistakes, robustness; as one HTML page."
EXAMPLES = """  python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
  python -m cifarnet.evaluate <run> tta=mirror corruptions=false
  python -m cifarnet.evaluate <run> data=folder data.root=pictures     other images of the same classes
  python -m cifarnet.evaluate <run> cifar10_c=CIFAR-10-C cifar10_1=CIFAR-10.1 cifar10h=cifar10h-probs.npy
"""
SPLITTING = ("val_fraction", "split_seed", "eval_batch_size")  # another data set is split and batched as the run's was
TYPES = {
    "tta": str | None,
    "tta_share": float | None,
    "precision": str | int | None,
    "accelerator": str,
    "corruptions": bool,
    "seed": int,
    "cifar10_c": str | None,
    "cifar10_1": str | None,
    "cifar10h": str | None,
    "classes": list[str],
    "output_dir": str | None,
}


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

    from cifarnet import build, hardware  # these take seconds more: a wrong path is told before
    from cifarnet.evaluation import public_sets, report, sections
    from cifarnet.evaluation.predictor import Predictor
    from cifarnet.permitted import located
    from cifarnet.runs.record import aligned, parameters, write, write_whole

    build.quieten_lightning()
    hardware.keep_freed_memory()
    config = configure(content, path, overrides)
    network, class_names = checkpoint.network(content, path, located(config.classes))
    datamodule = build.make_data(config)
    check_same_task(content["hyper_parameters"], datamodule)
    public = public_sets.read(datamodule, config.cifar10_c, config.cifar10_1, config.cifar10h)
    predictor = Predictor(network, **arithmetic(content, config))
    folder = make_folder(config.output_dir, path)

    record: dict[str, Any] = {
        "checkpoint": str(path),
        "network": type(network).__name__,
        "parameters": parameters(network),
        "epoch": content["epoch"] + 1,
        "class_names": class_names,
        "tta": predictor.tta,
        "tta_share": predictor.tta_share,
        "precision": predictor.precision,
        "data": datamodule.describe(),
        "hardware": hardware.describe(predictor.device),
        "versions": hardware.versions(),
        "git_commit": hardware.git_commit(),
        "command": shlex.join(["python", "-m", "cifarnet.evaluate", str(path), *overrides]),
        "config": OmegaConf.to_container(config, resolve=True),
    }
    print(report.heading(record), flush=True)
    measured, figures = sections.measure(predictor, datamodule, public, config.seed if config.corruptions else None)
    record |= measured | {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}

    files = {name: folder / f"{name}.png" for name in figures}
    for name, file in files.items():
        figures[name].savefig(file)
    write(record, folder / "metrics.json")
    html = report.render(record, {name: file.read_bytes() for name, file in files.items()})
    write_whole(folder / "report.html", html)
    print(aligned({**report.rows(record), "report": os.path.relpath(folder / "report.html")}))
    return record


def configure(content: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> DictConfig:
    """`configs/evaluate.yaml`, with the checkpoint's own data unless other data are chosen."""
    from cifarnet import checkpoint
    from cifarnet.permitted import located

    recorded, keys = content["resolved"]["data"], [cli.key_of(override) for override in overrides]
    if "data" in keys:
        saved = {key: recorded[key] for key in SPLITTING if isinstance(recorded.get(key), int | float)}
    else:
        named = [override for override, key in zip(overrides, keys, strict=True) if key == "classes"]
        own = located(cli.compose("evaluate", named).classes)
        saved = checkpoint.check_data(content, path, own)
        if "url" in recorded:
            saved["url"] = None  # no address of a stranger's; the user may give one
    saved["batch_size"] = 1  # nothing is trained: a small data set will do
    config = cli.compose("evaluate", [*(plain(f"data.{key}", saved[key]) for key in saved), *overrides])
    for key, hint in TYPES.items():
        settings.check_type(key, config[key], hint)
    return config


def plain(key: str, value: Any) -> str:
    """The override `key=value`, in which Hydra sees but a name and a value, whoever chose them."""
    from hydra.core.override_parser.types import Quote, QuotedString

    def written(value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(map(written, value))}]"
        return QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) else json.dumps(value)

    if not key.removeprefix("data.").isidentifier():
        raise UserError(f"The checkpoint's setting {key}={value} has no plain name. Say what to test on: data=…")
    return f"++{key}={written(value)}"


def check_same_task(hparams: Mapping[str, Any], datamodule: "ImageDataModule") -> None:
    """Refuse images of other classes, or of another size, than the network was trained on."""
    if list(datamodule.class_names) != list(hparams["class_names"]):
        raise UserError(
            f"The data has the classes {', '.join(datamodule.class_names)}; the network knows "
            f"{', '.join(hparams['class_names'])}. Give data of these classes, in folders of these names."
        )
    if datamodule.image_size != hparams["image_size"]:
        raise UserError(
            f"The images are {datamodule.image_size} pixels wide; the network was trained on {hparams['image_size']}. "
            f"For a folder: data.image_size={hparams['image_size']}"
        )


def arithmetic(content: Mapping[str, Any], config: DictConfig) -> dict[str, Any]:
    """How the network is to be asked: as in the run's own test, but for what is set."""
    run = content["resolved"]
    saved = {"tta": run["module"].get("tta", "none"), "tta_share": run["module"].get("tta_share", 1.0)}
    saved["precision"] = content["hyper_parameters"]["precision"]
    chosen = {key: config[key] for key in saved if config[key] is not None}
    return {**saved, **chosen, "channels_last": run.get("channels_last", True), "accelerator": config.accelerator}


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
    paths, overrides, _ = cli.parse("evaluate", DESCRIPTION, EXAMPLES)
    if len(paths) > 1:
        raise UserError(f"{len(paths)} paths are given, {', '.join(paths)}: evaluate one run or checkpoint at a time.")
    evaluate(paths[0], overrides)


def main() -> None:
    """The command `python -m cifarnet.evaluate`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
