"""Seconds from the command to the first training step and to `--help`; peak memory of a run.

    python benchmarks/startup.py [data=folder data.root=…]

Overrides are passed to `python -m cifarnet.train +experiment=baseline`. A first run, which is not measured, fills the
caches.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

import common

PEAK = "peak memory"


class FirstStep(Callback):
    """Write the time at the end of the first training step to a file and end the process."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, *_: Any) -> None:
        Path(self.path).write_text(str(time.time()))
        os._exit(0)


def train(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "cifarnet.train", "+experiment=baseline", *overrides]


def first_step(overrides: Sequence[str]) -> float:
    """Return the seconds from the command to the end of the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        clock = f"+callbacks.first={{_target_: startup.FirstStep, path: '{folder}/time'}}"
        command = train(*overrides, clock, f"hydra.run.dir={folder}/run")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        start = time.time()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return float(Path(folder, "time").read_text()) - start


def run(command: list[str]) -> float:
    """Run a command and return its seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def peak_memory(overrides: Sequence[str]) -> float:
    """Return the peak memory of one epoch with validation and test, in MiB (Linux and macOS)."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            train(*overrides, "trainer.max_epochs=1", f"hydra.run.dir={folder}"), check=True, capture_output=True
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    arguments = common.parser(__doc__, turns=5).parse_args()
    if not arguments.measure:
        first_step(arguments.overrides)
    seconds = {
        "help": lambda _: run(train("--help")),
        "import torch, lightning": lambda _: run([sys.executable, "-c", "import torch, lightning"]),
        "import cifarnet": lambda _: run([sys.executable, "-c", "import cifarnet"]),
        "first training step": first_step,
    }
    values = common.take_turns(seconds | {PEAK: peak_memory}, arguments)
    memory = values.pop(PEAK, None)
    if values:
        common.report("startup", "seconds", values, base="first training step")
    if memory:
        common.report("memory", "MiB", {PEAK: memory})


if __name__ == "__main__":
    main()
