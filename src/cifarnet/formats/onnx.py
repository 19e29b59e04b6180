"""ONNX, which onnxruntime and much else runs without PyTorch."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import onnxscript  # noqa: F401 - with which torch.onnx writes
import torch
from torch import Tensor

from cifarnet.inference.trained import Trained

FILE = "network.onnx"


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Write one file, weights included, for batches of any size: `images` in, `logits` out. The facts are its
    metadata, a name each; what is no text, as JSON."""
    shapes = ({0: "batch"},)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(
        classifier.network, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
    )
    for name, fact in facts.items():
        program.model.metadata_props[name] = fact if isinstance(fact, str) else json.dumps(fact)
    program.save(path, external_data=False)


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
