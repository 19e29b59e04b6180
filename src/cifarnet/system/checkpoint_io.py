"""A Lightning plugin that reads and writes checkpoints."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from cifarnet.system import files


class CheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and lets Lightning resume from a checkpoint that was already read.

    A checkpoint is written to a temporary file, flushed to the disk and renamed; the previous checkpoint is kept until
    then. (Lightning would write to the temporary folder, and copy the file if that folder is on another disk.)

    Args:
        content: the content of a checkpoint, which the first load returns; None reads files.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        self.content = content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        files.write(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.content is None:
            return super().load_checkpoint(path, *args, **kwargs)
        content, self.content = self.content, None  # free the memory afterwards
        return content
