"""What a run prints at its beginning and its end, and how its record is collected."""

import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from cifarnet.build import Built, with_total_steps
from cifarnet.callbacks.compilation import Compile
from cifarnet.callbacks.history import History, session
from cifarnet.data import ImageDataModule
from cifarnet.records.record import Record

NOTICED = 20  # one in so many images that an epoch leaves out is told


def heading(config: DictConfig, built: Built, fresh: bool = True) -> str:
    """What is about to be trained, for the terminal; `fresh`: from the beginning."""
    source, network = built.data.source, built.classifier.network
    name = config.model._target_.rpartition(".")[2]
    images = " / ".join(f"{len(split):,}" for split in (source.train, source.validation, source.test))
    shared = f", on {size} ranks" if (size := built.trainer.world_size) > 1 else ""
    begun = f"Begins with the weights of {config.start.checkpoint}\n" if fresh and config.get("start") else ""
    return (
        f"{type(built.data).__name__}: {images} images to train / validate / test, {len(source.class_names)} classes\n"
        f"{left_out(built.data)}{begun}"
        f"{name}: {parameters(network):,} parameters, in {built.trainer.precision}{shared}\n"
        f"{os.path.relpath(config.output_dir)}"
    )


def left_out(data: ImageDataModule) -> str:
    """That an epoch leaves images out, the last that fill no batch, where they are more than one in `NOTICED`."""
    count = data.images_per_epoch(data.source)
    rest = count % min(data.batch_size, count)
    told = f"data.batch_size={data.batch_size}: an epoch leaves {rest} of {count} images out, others each time.\n"
    return told if NOTICED * rest > count else ""


def parameters(network: torch.nn.Module) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in network.parameters())


def collect(config: DictConfig, built: Built, epoch: int, step: int) -> Record:
    """All that is worth keeping about a finished run, as plain data. Accuracies from 0 to 1, times in seconds.

    `epoch`, from 1, and `step` say when the weights that were tested came about; the validation accuracy is theirs.
    """
    trainer, classifier, data, fit_seconds = built
    history = next((callback for callback in trainer.callbacks if isinstance(callback, History)), History())
    validations = {row["step"]: row for row in history.validations}
    tested = validations.get(step) or {"epoch": epoch, **classifier.means("val")}
    test = classifier.means("test")
    sessions = history.sessions or [session(trainer)]
    return Record(
        name=config.name,
        val_accuracy=tested.get("val/accuracy", math.nan),
        tested_epoch=tested["epoch"],
        tested_step=step,
        test_accuracy=test["test/accuracy"],
        test_cross_entropy=test["test/cross_entropy"],
        partial=partial(trainer),
        tta=classifier.tta,
        test_accuracy_one_view=classifier.means("one_view")["one_view/accuracy"],
        epochs=trainer.current_epoch,
        fit_seconds=fit_seconds,
        seconds=history.seconds,
        test_seconds=history.test_seconds,
        compile_seconds=sum(callback.seconds for callback in trainer.callbacks if isinstance(callback, Compile)),
        images_per_second=history.images / history.seconds if history.seconds else math.nan,
        parameters=parameters(classifier.network),
        seed=config.seed,
        **{key: sessions[-1][key] for key in ("precision", "hardware", "versions", "git_commit")},
        sessions=sessions,
        data=data.describe(),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        overrides=overrides(Path(config.output_dir)),
        config=OmegaConf.to_container(config, resolve=False),
        resolved=OmegaConf.to_container(with_total_steps(config, classifier.total_steps), resolve=True),
        history=history.epochs,
        within_epochs=history.within_epochs,
    )


def partial(trainer: L.Trainer) -> str | None:
    """Lightning's settings that let a run skip images, to try something out: its figures are not to be compared."""
    for name in ("fast_dev_run", "overfit_batches"):
        if value := getattr(trainer, name):
            return f"{name}={value}"
    limits = {f"limit_{of}_batches": getattr(trainer, f"limit_{of}_batches") for of in ("train", "val", "test")}
    # 1.0 is all of an epoch's batches, 1 is one
    return ", ".join(f"{name}={value}" for name, value in limits.items() if str(value) != "1.0") or None


def overrides(folder: Path) -> list[str]:
    """What was typed to start the run, as Hydra keeps it."""
    kept = folder / ".hydra" / "overrides.yaml"
    return [str(line) for line in OmegaConf.load(kept)] if kept.is_file() else []


def summary(record: Record, folder: str) -> str:
    """The end of a run, for the terminal."""
    epoch, images = f"epoch {record.tested_epoch} of {record.epochs}", f"{record.data['test']:,} images"
    if record.partial:
        images = f"no result: {record.partial}"
    validation = record.val_accuracy
    tested = f"{images}, with that epoch's weights"
    if record.tta != "none":
        tested += f"; {record.test_accuracy_one_view:.2%} without tta={record.tta}"
    rows = {
        "validation accuracy": f"{validation:.2%}  ({epoch})" if math.isfinite(validation) else f"none  ({epoch})",
        "test accuracy": f"{record.test_accuracy:.2%}  ({tested})",
        "training": f"{record.seconds:.0f} s, {record.images_per_second:,.0f} images/s",
        "folder": os.path.relpath(folder),
    }
    if record.history and not math.isfinite(record.history[-1]["train/cross_entropy"]):
        rows["diverged"] = "the training loss is not a number any more: try a smaller optimizer.lr"
    return aligned(rows)


def aligned(rows: Mapping[str, str]) -> str:
    """Names and values in two columns, between empty lines."""
    width = max(map(len, rows))
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""])
