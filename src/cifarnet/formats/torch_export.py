"""The graph of `torch.export`, which PyTorch runs without this project and its classes."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifarnet.inference.trained import Trained

FILE = "network.pt2"
FACTS = "cifarnet.json"  # in the file


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the graph, for batches of any size, and beside it in the file the facts, as JSON."""
    torch.export.save(traced(classifier.network, images), path, extra_files={FACTS: json.dumps(facts)})


def traced(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The network's graph for a batch of any size."""
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()
