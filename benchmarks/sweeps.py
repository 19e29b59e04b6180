"""The time of a sweep's job beyond its training, and the time of a sweep with several jobs at a time.

    python benchmarks/sweeps.py [data=folder data.root=…]

The sweep has 24 seeds of `+experiment=quickstart` with one epoch, so that a job takes a few seconds. "beside training"
is the time that a job adds to the sweep (composing, building, validation and test, figures, checkpoints), without its
seconds in training batches. It excludes the first job, which also imports libraries and reads the images.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common

JOBS = 24


def sweep(overrides: Sequence[str], jobs: int, launcher: Sequence[str] = ()) -> tuple[float, float]:
    """Return the seconds of the sweep, and the mean seconds of training per job."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cifarnet.train", "-m", "+experiment=quickstart", "trainer=cpu"]
        command += ["trainer.max_epochs=1", f"seed=range({jobs})", *overrides, *launcher, f"hydra.sweep.dir={folder}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        whole = time.perf_counter() - start
        records = [json.loads(path.read_text()) for path in Path(folder).glob("*/metrics.json")]
    return whole, statistics.mean(record["seconds"] for record in records)


def beside_training(overrides: Sequence[str]) -> float:
    """Return the seconds per job, one at a time."""
    (whole, training), (alone, first) = sweep(overrides, JOBS), sweep(overrides, 1)
    return (whole - alone - (JOBS * training - first)) / (JOBS - 1)


def main() -> None:
    two = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
    sides = {
        "beside training, a job": beside_training,
        f"{JOBS} jobs, one at a time": lambda overrides: sweep(overrides, JOBS)[0],
        f"{JOBS} jobs, two at a time": lambda overrides: sweep(overrides, JOBS, two)[0],
    }
    values = common.take_turns(sides, common.parser(__doc__, turns=3).parse_args())
    common.report("sweeps", "seconds", values, base=f"{JOBS} jobs, one at a time")


if __name__ == "__main__":
    main()
