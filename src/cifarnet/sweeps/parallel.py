"""Jobs of a sweep in joblib's worker processes, each with its share of the machine, and the signal handlers of sweeps.

Ctrl-C in a terminal reaches only the process of the sweep, because each worker has its own process group. The sweep
forwards the signal to the workers, whose jobs finish their batch and save.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import psutil
from omegaconf import DictConfig

from cifarnet.errors import Interrupted
from cifarnet.system import hardware
from cifarnet.system.output import optional_output
from cifarnet.system.signals import handled, interrupting

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WORKER = "CIFARNET_WORKER"  # an environment variable of worker processes


def num_parallel(launcher: DictConfig) -> int:
    """Return the number of jobs that a launcher runs at a time.

    The launcher's setting `n_jobs` is this number, or 0 for one job per GPU (two jobs without GPUs), or -1 for one job
    per core.
    """
    n_jobs = launcher.get("n_jobs", 1)
    if n_jobs == 0:
        return len(hardware.gpus()) or 2
    return n_jobs if n_jobs > 0 else hardware.cores()


def worker_settings(num_workers: int) -> dict[str, Any]:
    """Return the arguments of `joblib.Parallel` for this number of workers."""
    return {"n_jobs": num_workers, "initializer": _start_worker, "initargs": (os.getpid(), num_workers)}


def _start_worker(parent: int, num_workers: int) -> None:
    hardware.end_with_parent(parent)
    for number in SIGNALS:  # ignored between jobs
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        os.setpgid(0, 0)
    os.environ[WORKER] = "1"
    import torch

    torch.set_num_threads(max(1, hardware.cores() // num_workers))


def is_worker() -> bool:
    """Whether this process is a worker that runs jobs in parallel with other workers."""
    return WORKER in os.environ


@contextlib.contextmanager
def job_in_worker(config: DictConfig, name: str) -> Iterator[None]:
    """In a worker process, assign a GPU to a job, handle signals, and print the job's name before each output line."""
    if not is_worker():
        yield
        return
    if config.trainer.accelerator != "cpu":
        hardware.claim_gpu()
    with optional_output(), interrupting(SIGNALS):
        out, err = NamedLines(sys.stdout, name), NamedLines(sys.stderr, name)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


class NamedLines(io.TextIOBase):
    """A stream that writes the name of a job before each line."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name, self.unfinished = stream, name, ""

    def write(self, text: str) -> int:
        *lines, self.unfinished = (self.unfinished + text).split("\n")
        for line in lines:
            self.stream.write(f"[{self.name}] {line}\n" if line else "\n")
        self.stream.flush()
        return len(text)


@contextlib.contextmanager
def forwarded_signals(stop_file: Path, command: str) -> Iterator[None]:
    """Forward the first Ctrl-C or SIGTERM to the workers, and wait until their jobs have saved.

    Args:
        stop_file: the file to create on the signal, so that no further job starts.
        command: the command that resumes the sweep.

    Raises:
        Interrupted: at the end, if a signal was received.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        handlers.close()  # a second signal stops at once
        received.append(number)
        stop_file.touch()
        print("\nFinishing the batches. A second signal stops at once, without saving.", file=sys.stderr, flush=True)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getpgid(child.pid) == child.pid:  # `_start_worker` has run
                    child.send_signal(signal.SIGINT)

    with contextlib.ExitStack() as handlers:
        if sys.platform != "win32":  # on Windows, the console sends Ctrl-C to the workers
            handlers.enter_context(handled(SIGNALS, forward))
        try:
            yield
        except BaseException:
            if not received:
                raise
    if received:
        raise Interrupted(f"Stopped by {signal.Signals(received[0]).name}.", 128 + received[0], command)
