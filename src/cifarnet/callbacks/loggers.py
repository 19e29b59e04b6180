"""What a run's loggers get beside its curves: its settings, its pictures, and what came out of it.

Names begin with `train/`, `val/` and `whole_run/`: TensorBoard sorts by name and shows the curves first.
"""

import io
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf
from PIL import Image

from cifarnet.build import with_total_steps
from cifarnet.config import deciding_settings
from cifarnet.records.record import Record
from cifarnet.records.tables import number
from cifarnet.system import files

RESULTS = ("val_accuracy", "test_accuracy", "test_cross_entropy", "seconds")  # of metrics.json


def log_settings(trainer: L.Trainer, config: Mapping[str, Any]) -> None:
    """The run's config, as recorded, with `${…}` replaced; without the loggers' own, which may hold addresses."""
    known = with_total_steps(OmegaConf.create(dict(config)), trainer.estimated_stepping_batches)
    resolved = OmegaConf.to_container(known, resolve=True)
    resolved.pop("logger", None)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # it keeps the file that it wrote when it knew none
            Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        logger.log_hyperparams(resolved)
        logger.save()


def log_picture(trainer: L.Trainer, name: str, pixels: np.ndarray) -> None:
    """A picture, uint8 [H, W, 3]: a PNG file in the run's folder, and in its loggers.

    Args:
        name: such as "train/augmented_batch", whose file is augmented_batch.png.
    """
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    files.write(Path(trainer.default_root_dir, f"{name.rpartition('/')[2]}.png"), content.getbuffer())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _log_image(logger, name, trainer.current_epoch, content.getvalue(), *pixels.shape)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, pixels, f"{name}.png")


def _log_image(logger: TensorBoardLogger, name: str, epoch: int, png: bytes, *shape: int) -> None:
    """A file as it is: torch's `add_image` would encode it once more."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width, channels = shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    summary = Summary(value=[Summary.Value(tag=name, image=image)])
    logger.experiment._get_file_writer().add_summary(summary, epoch)  # opened again, if it was closed


def log_results(record: Record, loggers: Iterable[Logger]) -> None:
    """The final figures of a run's record; nothing is logged after them."""
    results = {f"whole_run/{key}": getattr(record, key) for key in RESULTS}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _log_hparams(Path(logger.log_dir, "hparams"), deciding_settings(record.config, times=True), results)
        else:
            logger.log_metrics(results, step=record.epochs)
        logger.finalize("success")
        if isinstance(logger, WandbLogger):  # the next job of a sweep has its own
            logger.experiment.finish()


def _log_hparams(folder: Path, columns: Mapping[str, str], results: Mapping[str, float]) -> None:
    """A row in TensorBoard's HParams, which finds out by itself what was varied.

    It would not if the row named its columns, as torch's `add_hparams` does: then those of an arbitrary run are shown.
    It takes all curves beside the row for results: so it has a folder of its own.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)  # of this run, before more epochs were added
    values = {key: number(text) if math.isfinite(number(text)) else text for key, text in columns.items()}
    with SummaryWriter(str(folder)) as writer:
        _, start, end = hparams(values, dict(results))
        for summary in (start, end):
            writer._get_file_writer().add_summary(summary)
        for name, value in results.items():
            writer.add_scalar(name, value)
