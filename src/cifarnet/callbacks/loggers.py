"""Log the settings, pictures and final results of a run.

The names begin with `train/`, `val/` and `whole_run/`. TensorBoard sorts by name, so it shows the curves first.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf
from PIL import Image

from cifarnet.classifier import Classifier
from cifarnet.cli import key_of
from cifarnet.config import EFFECTS, deciding_settings, is_in, with_total_steps
from cifarnet.records.record import Record
from cifarnet.records.tables import parse_number
from cifarnet.system import files

FIELDS = ("test_accuracy", "val_accuracy", "test_cross_entropy", "seconds")  # of Record
NAMES = ("accuracy_test", "accuracy_val", "cross_entropy_test", "seconds")  # TensorBoard sorts them: accuracies first


class Drawing(Callback):
    """A callback that draws pictures of a finished run, after the record of the run has been written."""

    def draw(self, trainer: L.Trainer, classifier: Classifier) -> None:
        raise NotImplementedError


def log_settings(trainer: L.Trainer, config: Mapping[str, Any]) -> None:
    """Log the config with `${…}` resolved, without the section `logger`, which may contain URLs."""
    known = with_total_steps(OmegaConf.create(dict(config)), cast("Classifier", trainer.lightning_module).total_steps)
    settings = cast("dict[str, Any]", OmegaConf.to_container(known, resolve=True))
    settings.pop("logger", None)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # it does not replace a file that was written without settings
            Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        logger.log_hyperparams(settings)
        logger.save()


def log_picture(trainer: L.Trainer, name: str, pixels: np.ndarray) -> None:
    """Log a picture, and save it in the run's folder as a PNG file.

    Args:
        name: a name such as "train/augmented_batch", whose file is augmented_batch.png.
        pixels: the picture, uint8 [H, W, 3].
    """
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    files.write(Path(trainer.default_root_dir, f"{name.rpartition('/')[2]}.png"), content.getbuffer())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, trainer.current_epoch, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, pixels, f"{name}.png")


def log_results(record: Record, trainer: L.Trainer, classifier: Classifier) -> None:
    """Log the pictures and results of a finished run and close the loggers."""
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        if isinstance(callback, Drawing):
            callback.draw(trainer, classifier)
    results = {f"whole_run/{name}": getattr(record, field) for name, field in zip(NAMES, FIELDS, strict=True)}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _log_hparams(Path(logger.log_dir, "hparams"), _varied(record), results)
        else:
            logger.log_metrics(results, step=record.epochs)
        logger.finalize("success")
        if isinstance(logger, WandbLogger):  # otherwise the next job of a sweep would log to the same run
            logger.experiment.finish()


def _varied(record: Record) -> dict[str, str]:
    """Return the settings in the command of a run that affect its result or duration; without any, all such settings.

    A sweep's jobs name the settings that vary. The columns of constant settings would hide the results. The choice of
    callbacks is left out; a setting of one of them is returned if the command names it.
    """
    settings = deciding_settings(record.config, times=True)
    chosen = {key_of(override): override.partition("=")[2] for override in record.overrides}
    ignored = ["callbacks", *EFFECTS["nothing"]]
    named = {key: settings.get(key, text) for key, text in chosen.items() if key in settings or not is_in(key, ignored)}
    return named or {key: text for key, text in settings.items() if not is_in(key, ignored)}


def _log_hparams(folder: Path, settings: Mapping[str, str], results: Mapping[str, float]) -> None:
    """Log a row for TensorBoard's HParams tab.

    Unlike torch's `add_hparams`, it does not declare the columns of the row, so that TensorBoard finds the settings
    that differ between runs; otherwise it would show the columns of an arbitrary run. The row has a separate folder
    because TensorBoard lists all curves in the same folder as results.
    """
    from torch.utils.tensorboard import FileWriter
    from torch.utils.tensorboard.summary import hparams, scalar

    for file in folder.glob("events.out.*"):  # written before the run was resumed
        file.unlink()
    values = {key: parse_number(text) if math.isfinite(parse_number(text)) else text for key, text in settings.items()}
    _, start, end = hparams(values, dict(results))
    writer = FileWriter(folder)
    for summary in (start, end, *(scalar(name, value) for name, value in results.items())):
        writer.add_summary(summary)
    writer.close()
