"""AOTInductor: the network compiled for this machine's processor, to be run from Python or C++."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifarnet.compiling import telling_no_compiler
from cifarnet.evaluation.trained import Trained
from cifarnet.formats.torch_export import traced

FILE = "network_aoti.pt2"


def write(classifier: Trained, images: Tensor, path: Path, facts: Mapping[str, Any]) -> None:
    """Compile the network for batches of any size, contiguous in memory: it does not look at strides. The facts, as
    JSON, are what `get_metadata()["cifarnet"]` gives.

    Raises:
        UserError: there is no compiler.
    """
    settings = {"aot_inductor.metadata": {"cifarnet": json.dumps(facts)}}
    program = traced(classifier.network, images)
    with telling_no_compiler("format=aoti", "Install one (g++)."):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def load(path: Path, classes: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    return torch._inductor.aoti_load_package(str(path))
