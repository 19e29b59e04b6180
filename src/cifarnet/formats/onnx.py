"""The ONNX format, which onnxruntime and other libraries run without PyTorch."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import onnxscript  # noqa: F401  required by torch.onnx
import torch
from torch import Tensor

from cifarnet.inference.trained import Trained

FILE = "network.onnx"


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a file for batches of any size, with the input `images`, the output `logits` and the facts as metadata."""
    program = torch.onnx.export(
        classifier.network,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    for name, fact in facts.items():
        program.model.metadata_props[name] = fact if isinstance(fact, str) else json.dumps(fact)
    program.save(path, external_data=False)


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the file with onnxruntime."""
    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
