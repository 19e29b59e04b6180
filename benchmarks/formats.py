"""A network in PyTorch, as in `predict`, and as exported: images/s, with batches of 1 and 256, in float32.

python benchmarks/formats.py RUN [--turns 5] [--only "PyTorch, batch 1" "onnx, batch 1"]
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import cifarnet
import common
from cifarnet.export import find_format
from cifarnet.system import hardware
from cifarnet.system.log_output import quiet_libraries

SECONDS = 3.0
FORMATS = ["PyTorch", "torch_export", "onnx"]


@torch.no_grad()
def rate(overrides: Sequence[str], kind: str, batch: int) -> float:
    quiet_libraries()
    classifier = cifarnet.load(*overrides)
    images = torch.randint(
        0, 256, (batch, 3, classifier.checkpoint.image_size, classifier.checkpoint.image_size), dtype=torch.uint8
    )
    hardware.keep_freed_memory()
    run = classifier.predictor(tta="none", precision="32-true")
    if kind != "PyTorch":
        form = find_format(kind)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, form.FILE)
            form.write(classifier, images[:1].repeat(2, 1, 1, 1), path, {})
            run = form.load(path)
    for _ in range(10):
        run(images)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        run(images)
        steps += 1
    return batch * steps / (time.perf_counter() - start)


SIDES = {f"{kind}, batch {batch}": partial(rate, kind=kind, batch=batch) for batch in (1, 256) for kind in FORMATS}


def main() -> None:
    common.report("formats", "images/s", common.take_turns(SIDES, common.parser(__doc__, turns=5).parse_args()))


if __name__ == "__main__":
    main()
