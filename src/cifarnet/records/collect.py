"""The text that a run prints before and after training, and the creation of its record."""

import math
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from cifarnet.build import Built
from cifarnet.callbacks.compilation import Compile
from cifarnet.callbacks.history import History, new_session
from cifarnet.config import with_total_steps
from cifarnet.records.record import Data, Record
from cifarnet.records.tables import overrides, percent, row_table

LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")


def heading(config: DictConfig, built: Built, fresh: bool = True) -> str:
    """Return a description of the data and the network, which is printed before training.

    Args:
        fresh: whether the run starts from the beginning.
    """
    data, source, trainer = built.data, built.data.source, built.trainer
    train, val, test = (len(split) for split in (source.train, source.validation, source.test))
    images = f"{train:,} training, {val:,} validation and {test:,} test images"
    lines = [f"{data.source_name}: {images}, {len(source.class_names)} classes"]
    if selection := source.selection:
        per_class, num_wrong = selection["train_per_class"], selection["wrong_labels"]
        sizes = " to ".join(f"{size:,}" for size in dict.fromkeys([min(per_class), max(per_class)]))
        wrong = f"; {num_wrong:,} labels differ from those of the data set" if num_wrong else ""
        lines.append(f"Training: {sizes} images per class{wrong}")
    count = data.images_per_epoch(source)
    dropped = count % min(data.batch_size, count)
    if 20 * dropped > count:  # for small data sets only
        lines.append(f"data.batch_size={data.batch_size}: each epoch drops {dropped} of {count} images at random.")
    if fresh and OmegaConf.select(config, "start.checkpoint") is not None:
        state = " and the state of the optimizer" if config.start.get("optimizer") else ""
        lines.append(f"Starts from the weights{state} of {config.start.checkpoint}")
    name, parameters = config.model._target_.rpartition(".")[2], num_parameters(built.classifier.network)
    ranks = f", on {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    lines.append(f"{name}: {parameters:,} parameters, precision {trainer.precision}{ranks}")
    lines.append(f"Folder: {os.path.relpath(config.output_dir)}")
    return "\n".join(lines)


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def collect(config: DictConfig, built: Built, epoch: int, step: int) -> Record:
    """Return the record of a finished run.

    Args:
        epoch, step: the epoch (from 1) and the step after which the tested weights were saved.
    """
    trainer, classifier, data, fit_seconds = built
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    history = next((callback for callback in callbacks if isinstance(callback, History)), History())
    validations = {row["step"]: row for row in history.validations}
    tested = validations.get(step) or {"epoch": epoch, **classifier.means("val")}
    test = classifier.means("test")
    sessions = history.sessions or [new_session(trainer)]
    last: Any = sessions[-1]
    resolved = plain(with_total_steps(config, classifier.total_steps), resolve=True)
    return Record(
        name=config.name,
        val_accuracy=tested.get("val/accuracy", math.nan),
        tested_epoch=tested["epoch"],
        tested_step=step,
        test_accuracy=test["test/accuracy"],
        test_cross_entropy=test["test/cross_entropy"],
        partial=partial(config.trainer),
        tta=classifier.tta,
        test_accuracy_one_view=classifier.means("one_view")["one_view/accuracy"],
        epochs=trainer.current_epoch,
        fit_seconds=fit_seconds,
        seconds=history.seconds,
        test_seconds=history.test_seconds,
        compile_seconds=sum(callback.seconds for callback in callbacks if isinstance(callback, Compile)),
        images_per_second=history.images / history.seconds if history.seconds else math.nan,
        parameters=num_parameters(classifier.network),
        seed=config.seed,
        **{key: last[key] for key in ("precision", "hardware", "versions", "git_commit")},
        sessions=sessions,
        data=cast("Data", data.describe()),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        overrides=overrides(Path(config.output_dir)),
        config=plain(config, resolve=False),
        resolved={key: value for key, value in resolved.items() if key != "logger"},  # it may contain passwords
        history=history.epochs,
        within_epochs=history.within_epochs,
    )


def plain(config: DictConfig, resolve: bool) -> dict[str, Any]:
    """Return a config as plain data, with its `${…}` resolved or not."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve))


def partial(trainer: DictConfig) -> str | None:
    """Return the settings of Lightning's Trainer that make a run skip images; None if it uses all images."""
    skipping = [name for name in ("fast_dev_run", "overfit_batches") if trainer.get(name)]
    # 1.0 means all batches, 1 means one batch
    skipping += [name for name in LIMITS if str(trainer.get(name)) not in ("None", "1.0")]
    return ", ".join(f"{name}={trainer[name]}" for name in skipping) or None


def summary(record: Record, folder: str) -> str:
    """Return a table of the results of a run."""
    data = record.data
    validation = percent(record.val_accuracy, data["val"]) if math.isfinite(record.val_accuracy) else "none"
    test = percent(record.test_accuracy, data["test"]) if math.isfinite(record.test_accuracy) else "none"
    one_view = percent(record.test_accuracy_one_view, data["test"])
    epoch = f"{round(record.tested_epoch, 2):g}"  # a validation within an epoch has a fraction
    images = f"not a full run: {record.partial}" if record.partial else f"{record.data['test']:,} images"
    no_tta = "" if record.tta == "none" else f"; {one_view} without tta={record.tta}"
    planned = record.resolved["trainer"].get("max_epochs") or -1
    ended = f", ended after {record.epochs} of {planned} epochs" if record.epochs < planned else ""
    rows = {
        "validation accuracy": f"{validation}  (epoch {epoch} of {record.epochs})",
        "test accuracy": f"{test}  ({images}, weights of epoch {epoch}{no_tta})",
        "training": f"{record.seconds:.0f} s, {record.images_per_second:,.0f} images/s{ended}",
        "folder": os.path.relpath(folder),
    }
    return row_table(rows)
