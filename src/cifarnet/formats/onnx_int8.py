"""An ONNX file with 8-bit weights and activations, which is smaller and faster than that of `formats.onnx`.

onnxruntime's static quantization (Jacob et al., 2018, https://arxiv.org/abs/1712.05877) writes it. Training images
determine the range of each activation. Predictions change, so the accuracy is measured.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static
from tqdm import tqdm

from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.evaluation.metrics import paired_interval
from cifarnet.formats import onnx as float32
from cifarnet.inference.test_images import sample
from cifarnet.inference.trained import Trained
from cifarnet.records.tables import percent, row_table

FILE = "network_int8.onnx"
NUM_CALIBRATION = 1000  # the largest number of training images for calibration
BATCH_SIZE = 64  # in the calibration and the comparison


def write_measured(
    classifier: Trained, data: ImageDataModule, path: Path, facts: Mapping[str, Any], tolerance: float
) -> str:
    """Write the file, and return its accuracy, size and speed beside those of the float32 file, as text.

    Args:
        data: training images, for calibration, and test images, for the comparison.
        tolerance: the largest allowed fall of the test accuracy, in points.

    Raises:
        UserError: the accuracy falls by more.
    """
    images, _ = sample(data.source.train, NUM_CALIBRATION)
    original, prepared = path.with_name(f"original_{path.name}"), path.with_name(f"prepared_{path.name}")
    known = {name: fact for name, fact in facts.items() if not name.startswith("test_")}  # they change
    float32.write(classifier, images[:1].repeat(2, 1, 1, 1), original, known)
    quant_pre_process(original, prepared, skip_symbolic_shape=True)  # as onnxruntime recommends
    parts = tqdm(images.split(BATCH_SIZE), "calibration", leave=False, disable=None)
    inputs = ({"images": part.numpy()} for part in parts)
    reader: Any = SimpleNamespace(get_next=lambda: next(inputs, None))
    norms = [node.name for node in onnx.load(prepared).graph.node if "Normalization" in node.op_type]
    # reduce_range: weights of 7 bits, because x86 processors without VNNI saturate sums of 8-bit products
    bits: Any = {"per_channel": True, "reduce_range": True, "activation_type": QuantType.QUInt8}
    quantize_static(prepared, path, reader, nodes_to_exclude=norms, **bits)  # norms have no integer kernels

    networks, correct, seconds = [float32.load(original), float32.load(path)], ([], []), [0.0, 0.0]
    data.eval_batch_size = BATCH_SIZE
    for batch in tqdm(data.test_dataloader(), "test", leave=False, disable=None):
        for which, network in enumerate(networks):  # in turns, so that other processes slow down both alike
            start = time.perf_counter()
            logits = network(batch.images.contiguous())
            seconds[which] += time.perf_counter() - start
            correct[which].append(logits.argmax(1) == batch.labels)
    before, after = map(torch.cat, correct)
    count, fall = len(after), int(before.sum()) - int(after.sum())
    low, high = paired_interval(before, after)
    interval = f"95% interval {100 * low:+.2f} to {100 * high:+.2f}, {count:,} test images"
    change = f"changes the test accuracy by {-100 * fall / count:+.2f} points ({interval})"
    if 100 * fall / count > tolerance:
        remedy = f"tolerance={tolerance} allows a smaller fall. Choose a larger tolerance, or format=onnx."
        raise UserError(f"format=onnx_int8 {change}, but {remedy}")
    rows = {}
    for name, right, file, took in zip(("float32", "int8"), (before, after), (original, path), seconds, strict=True):
        accuracy, megabytes = percent(int(right.sum()) / count, count), file.stat().st_size / 1e6
        rows[name] = f"{accuracy} test accuracy, {megabytes:.2f} MB, {count / took:,.0f} images/s"
    calibrated = f"8-bit integers, calibrated on {len(images):,} training images. This {change}."
    return f"{calibrated}\n{row_table(rows)}\nThe speed is that of onnxruntime with batches of {BATCH_SIZE} images."
