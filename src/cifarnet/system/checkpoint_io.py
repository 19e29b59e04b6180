"""A Lightning plugin that reads and writes checkpoints."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from cifarnet.errors import UserError
from cifarnet.system import files


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and lets Lightning resume from a checkpoint that was already read.

    A checkpoint is written to a temporary file, flushed to the disk and renamed; the previous checkpoint is kept until
    then. (Lightning would write to the temporary folder, and copy the file if that folder is on another disk.)

    Args:
        content: the content of a checkpoint, which the first load returns; None reads files.
        folder: the folder in which a resumed run may write and remove `.ckpt` files; None does not limit a new run.
    """

    def __init__(self, content: dict[str, Any] | None = None, folder: Path | None = None) -> None:
        self.content, self.folder = content, folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not self._is_allowed(Path(path)):
            raise UserError(f"{path} is outside the run's folder. Correct the setting filename of the checkpoints.")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        files.write(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.content is None:
            return super().load_checkpoint(path, *args, **kwargs)
        content, self.content = self.content, None  # free the memory afterwards
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a regular file. (Lightning removes a folder with its content, and callbacks take names from files.)"""
        path = Path(path)
        if path.is_file() and not path.is_symlink() and self._is_allowed(path):
            path.unlink()

    def _is_allowed(self, path: Path) -> bool:
        return self.folder is None or (path.suffix == ".ckpt" and self.folder.resolve() in path.resolve().parents)


def check_state(part: Any) -> None:
    """Check that the state of a callback or a schedule can be read from a checkpoint, which contains no objects.

    Raises:
        UserError: the state contains an object of a class.
    """
    state, file = part.state_dict(), io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        reason = str(error).partition(". ")[0]
        problem = f"{type(part).__name__}: a run with this state could not be resumed: {reason}"
        remedy = "Return only numbers, strings, tensors, lists and dictionaries from state_dict()."
        raise UserError(f"{problem}. {remedy}") from error
