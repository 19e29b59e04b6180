"""The files that Lightning's ModelCheckpoint callbacks write into a run's folder."""

import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cifarnet.errors import UserError
from cifarnet.system import files

BEST, LAST = "best.ckpt", "last.ckpt"
LONGEST = 200  # bytes; a temporary file has a longer name


def model_checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def folder(trainer: L.Trainer) -> Path:
    """Return the folder of the run's checkpoints."""
    return Path(os.path.realpath(trainer.default_root_dir), "checkpoints")


def check_names(trainer: L.Trainer) -> None:
    """Check that each file is in the run's folder, where resuming looks for it, and is not replaced by another one.

    Raises:
        UserError: the name of a file cannot be used.
    """
    names: set[Path] = set()
    for callback in model_checkpoints(trainer):
        callback.dirpath = callback.dirpath or str(folder(trainer))
        name, problem = callback.filename, ""
        has_name = {LAST: callback.monitor is None, BEST: callback is trainer.checkpoint_callback}
        try:
            counts = ({"epoch": torch.tensor(count), "step": torch.tensor(count)} for count in range(2))
            file, later = (Path(os.path.realpath(callback.format_checkpoint_name(count))) for count in counts)
        except (ValueError, LookupError, AttributeError) as error:
            raise UserError(f"ModelCheckpoint: filename={name} is not valid: {error}. Correct it.") from error
        if folder(trainer) not in file.parents:
            problem = f"the file {file} is outside {folder(trainer)}. Remove dirpath, and .. from filename"
        elif len(os.fsencode(file.name)) > LONGEST:
            problem = f"the name has more than {LONGEST} bytes"
        elif file in names or (file.parent == folder(trainer) and not has_name.get(file.name, True)):
            problem = f"another checkpoint replaces {file.name}"
        elif file == later and "{" not in str(name) and callback.save_top_k not in (0, 1):
            problem = f"save_top_k={callback.save_top_k} needs a name for each epoch. Add {{epoch}} to the name"
        elif callback.save_on_exception:
            problem = "save_on_exception saves within a batch, where a run cannot be resumed exactly. Remove it"
        if problem:
            raise UserError(f"ModelCheckpoint: filename={name}: {problem}. Correct its settings.")
        names.add(file)


def copy_best(trainer: L.Trainer) -> None:
    """Copy the best checkpoint to `best.ckpt`, where other commands look for it, if it has another name."""
    best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if trainer.is_global_zero and best.is_file() and best.name not in (BEST, LAST):
        files.write(folder(trainer) / BEST, best.read_bytes())


def last_checkpoint(trainer: L.Trainer) -> Path | None:
    """Return the path of `last.ckpt`; None if the run saves no checkpoints."""
    return folder(trainer) / LAST if model_checkpoints(trainer) else None
