"""Jobs of a sweep side by side: each has its share of the machine, names itself, and stops when the sweep does."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cifarnet.errors import Interrupted, UserError
from cifarnet.system import distributed, hardware

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# how many jobs hydra/launcher=parallel runs at a time: one a GPU; two where there is none
OmegaConf.register_new_resolver("default_jobs", lambda: len(hardware.gpus()) or 2, replace=True)


def jobs_at_a_time(launcher: DictConfig) -> int:
    """How many the launcher of a sweep runs; joblib's -1 is one a core."""
    jobs = launcher.get("n_jobs", 1)
    if type(jobs) is not int or jobs == 0:
        raise UserError(f"hydra.launcher.n_jobs={jobs}: give a whole number, 1 or more; -1 is one a core.")
    return jobs if jobs > 0 else hardware.cores()


@contextlib.contextmanager
def side_by_side(config: DictConfig, name: str) -> Iterator[bool]:
    """What a job's process does where others run beside it. Yields whether they do."""
    jobs = jobs_at_a_time(HydraConfig.get().launcher)
    if jobs == 1:
        yield False
        return
    if config.trainer.devices != 1 or distributed.placement().world_size > 1:
        raise UserError("Runs on several devices are trained one after the other: leave out hydra/launcher.")
    if config.trainer.accelerator != "cpu":
        hardware.claim_gpu()
    if config.threads is None:
        import torch

        torch.set_num_threads(max(1, hardware.cores() // jobs))
    out, err = Named(sys.stdout, name), Named(sys.stderr, name)
    with _own_signals(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield True


class Named(io.TextIOBase):
    """Passes whole lines on, each after the name of its job."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name, self.begun = stream, name, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self.stream.write(f"[{self.name}] {line}\n" if line else "\n")
        self.stream.flush()
        return len(text)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Signals come from the process that started this one (`passing_signals`): they stop a job, and nothing between."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("Stopped.", status=128 + number)

    if sys.platform == "win32":
        yield
        return
    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        os.setpgid(
            0, 0
        )  # a terminal's Ctrl-C goes to its whole group; and who started this one sees that it may stop it
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def passing_signals(stop_file: Path) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are passed on to the jobs, and this process waits until they have saved.

    Args:
        stop_file: made then, so that no other job begins.

    Yields:
        The signal received.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        stop_file.touch()
        print("\nFinishing the batches. Once more stops at once, without saving.", file=sys.stderr, flush=True)
        for child in psutil.Process().children():  # one that still starts will find the file
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getpgid(child.pid) == child.pid:
                    child.send_signal(signal.SIGINT)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous: dict[int, Any] = {}
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        restore()


@contextlib.contextmanager
def joblib_of_ones_own() -> Iterator[None]:
    """joblib's processes end with this one from their first moment on, before any job of theirs begins."""
    from joblib import parallel
    from joblib._parallel_backends import LokyBackend

    class Ending(LokyBackend):
        def configure(self, *args: Any, **settings: Any) -> int:
            return super().configure(*args, **settings, initializer=hardware.end_with_parent, initargs=(os.getpid(),))

    before = parallel.BACKENDS["loky"]
    parallel.register_parallel_backend("loky", Ending)
    try:
        yield
    finally:
        parallel.register_parallel_backend("loky", before)
