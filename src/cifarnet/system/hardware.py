"""The precision, threads, memory and GPUs of this machine, and their description for records."""

import atexit
import contextlib
import ctypes
import getpass
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

if TYPE_CHECKING:  # torch takes seconds to import
    import torch
    from omegaconf import DictConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
CLAIMED = "CIFARNET_GPU"  # the environment variable that names the GPU of this process


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory instead of returning it to the kernel.

    Every training step frees and allocates the same large tensors. By default, glibc maps each tensor again, and the
    kernel clears its pages at the first access, which can take a third of the time. With this setting, the memory usage
    of the process stays at its peak, which training reaches in its first step.

    Returns:
        Whether the setting was applied; it requires glibc.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False  # such as musl
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def best_precision(accelerator: str) -> str:
    """Return bf16-mixed if the hardware supports bfloat16, and 32-true otherwise."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
    # on other CPUs, bfloat16 is emulated and slower than float32
    fast_on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if on_cpu and fast_on_cpu else "32-true"


@contextlib.contextmanager
def prepared_process(config: "DictConfig") -> Iterator[None]:
    """Set the memory allocation and the number of threads for a run; restore the number of threads afterwards."""
    import torch

    if config.keep_freed_memory:
        keep_freed_memory()
    previous = torch.get_num_threads()
    torch.set_num_threads(config.threads or default_threads() or previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def default_threads() -> int | None:
    """Return the number of threads for a process under SLURM, or for one of several processes under torchrun; otherwise
    return None, for PyTorch's default."""
    # LOCAL_WORLD_SIZE is set by torchrun; SLURM assigns separate cores to each task
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if slurm_cores() is None and local_world_size == 1:
        return None
    return max(1, cores() // local_world_size)


def cores() -> int:
    """Return the number of cores that this process may use; a cluster or a container may limit it."""
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(may_use, slurm_cores() or may_use)


def slurm_cores() -> int | None:
    """Return the number of cores that SLURM assigned to this process; None if SLURM did not start it."""
    env = os.environ
    if (count := env.get("SLURM_CPUS_PER_TASK")) is not None:
        return int(count)
    return max(1, int(env["SLURM_CPUS_ON_NODE"]) // slurm_tasks()) if "SLURM_CPUS_ON_NODE" in env else None


def slurm_tasks() -> int:
    """Return the number of processes that srun started on this machine."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) // int(os.environ.get("SLURM_STEP_NUM_NODES", 1))


def waiting_seconds() -> float:
    """Return how long the threads of this process have waited for a core, in total; 0 on systems other than Linux."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # the thread has ended
            nanoseconds += int(path.read_text().split()[1])
    return nanoseconds / 1e9


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and not name.startswith("-")]
    try:  # torch takes seconds to import
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(index) for index, _ in enumerate(re.findall(r"^GPU ", listed, re.MULTILINE))]


def claim_gpu() -> None:
    """Make only one GPU visible to this process, which no other job uses. If there are more processes than GPUs, the
    GPUs are shared evenly. The claim ends with the process."""
    if CLAIMED in os.environ:
        return
    folder = Path(tempfile.gettempdir(), f"cifarnet-{getpass.getuser()}")
    present = gpus()
    for turn in range(1000 if present else 0):
        for name in present:
            folder.mkdir(exist_ok=True)
            lock = FileLock(folder / f"gpu-{name}-{turn}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(blocking=False)
                atexit.register(lock.release)  # holds the lock until the process ends
                os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[CLAIMED] = name
                return


def describe(device: "torch.device", ranks: int = 1) -> dict[str, Any]:
    """Describe the device of a measurement, and the number of ranks, each of which uses one device."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    counts = {"threads": torch.get_num_threads(), **({"ranks": ranks} if ranks > 1 else {})}
    return {"device": device.type, "name": name, **counts, "system": platform.platform()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    packages = ("torch", "torchvision", "lightning", "hydra-core")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if it has changes; None if it was installed from a wheel."""
    checkout = Path(__file__).parents[3]
    if not (checkout / "configs").is_dir():
        return None  # installed from a wheel
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, because another sweep may resume in the folder of a job."""
    if sys.platform == "linux":  # immediate; the thread is for other systems, and for a parent that has already ended
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent):  # on Windows, getppid does not change
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
