"""How a run's checkpoints are written."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from cifarnet.system import files


class WholeCheckpoints(TorchCheckpointIO):
    """A checkpoint is written beside its place, flushed to the disk, and renamed: until then the former one stays.

    (Lightning's way writes to the temporary folder and copies from there, if that is on another disk.) `torch.save`
    makes a zip archive, which holds a checksum of each member: `checkpoint.read` compares them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        files.write(path, content.getbuffer())
