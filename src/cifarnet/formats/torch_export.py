"""The graph format of `torch.export`, which PyTorch runs without this project."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifarnet.inference.trained import Trained

FILE = "network.pt2"


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a file for batches of any size, with the facts in its extra file `cifarnet.json`."""
    program = torch.export.export(classifier.network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()  # torch's writer of files ends the process if the disk is full
    torch.export.save(program, content, extra_files={"cifarnet.json": json.dumps(facts)})
    path.write_bytes(content.getbuffer())


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    """Return the graph as a module."""
    return torch.export.load(path).module()
