"""Prediction from image files compared with decoding alone and the network alone: images/s, with equally many threads.

    python benchmarks/predict.py RUN FOLDER [tta=none] [--turns 5]

On a CPU, decoding and the network share the cores, which limits prediction to 1 / (1/decoding + 1/network).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import cifarnet
import common
from cifarnet import cli
from cifarnet.data.decoding import decode_all
from cifarnet.data.pixels import image_files
from cifarnet.inference.trained import Trained
from cifarnet.system import hardware
from cifarnet.system.log_output import quiet_libraries

MOST = 10_000  # images
BATCH = 256


def rate(overrides: Sequence[str], run: Callable[[Trained, list[str], dict[str, Any]], None]) -> float:
    quiet_libraries()
    hardware.keep_freed_memory()
    path, folder = [given for given in overrides if not cli.is_setting(given)]
    settings = dict(given.split("=") for given in overrides if cli.is_setting(given))
    classifier, files = cifarnet.load(path), list(image_files(folder))[:MOST]
    run(classifier, files[: 2 * BATCH], settings)  # starts threads and selects kernels
    start = time.perf_counter()
    run(classifier, files, settings)
    return len(files) / (time.perf_counter() - start)


def decoding(classifier: Trained, files: list[str], settings: dict[str, Any]) -> None:
    for _ in decode_all(files, classifier.checkpoint.image_size, BATCH, hardware.cores()):
        pass


def network(classifier: Trained, files: list[str], settings: dict[str, Any]) -> None:
    size = classifier.checkpoint.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, 3, size, size), np.uint8))
    predictor = classifier.predictor(**settings)
    for _ in range(0, len(files), BATCH):
        predictor(pixels)[1].cpu()


def predicting(classifier: Trained, files: list[str], settings: dict[str, Any]) -> None:
    for _ in classifier.answers(files, batch_size=BATCH, **settings):
        pass


SIDES = {
    "decoding alone": lambda overrides: rate(overrides, decoding),
    "the network alone": lambda overrides: rate(overrides, network),
    "predict": lambda overrides: rate(overrides, predicting),
}


def main() -> None:
    arguments = common.parser(__doc__, turns=5).parse_args()
    values = common.take_turns(SIDES, arguments)
    alone = [statistics.median(values[side]) for side in SIDES if side != "predict" and side in values]
    bound = 1 / sum(1 / value for value in alone) if alone else float("nan")
    common.report(
        "predict", "images/s", values, base="predict", together=f"{bound:,.0f} images/s at most, on shared cores"
    )


if __name__ == "__main__":
    main()
