"""Several processes (ranks) that train one network together, with one device per rank, on one or more machines.

`trainer=ddp` starts them on the composed config of a run (`launch`). If the command is run with torchrun or srun, they
are already running: rank 0 reads the command, and writes each run to a file, which the other ranks read. In both cases,
every rank builds and trains, and only rank 0 prints and writes.

The processes that `launch` starts find each other by a private file and communicate over the loopback interface. Those
that torchrun or srun started use PyTorch's network protocols, which have no authentication.
"""

import contextlib
import json
import logging
import math
import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import psutil

from cifarnet.errors import Interrupted, MachineFault, UserError
from cifarnet.system import files
from cifarnet.system.hardware import end_with_parent, slurm_tasks
from cifarnet.system.signals import STOPPING, handled

if TYPE_CHECKING:  # torch and lightning take seconds to import
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from torch import Tensor
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# set in processes that `launch` started: the process that launched them, and the file by which they find each other
LAUNCHED, STORE = "CIFARNET_LAUNCHED", "CIFARNET_STORE"
MACHINE_FAULT = 75  # the status that a rank reports for a fault of the machine; EX_TEMPFAIL in sysexits.h


class Placement(NamedTuple):
    """The position of this process among the processes that torchrun, srun or `launch` started."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # the number of processes on this machine


def placement() -> Placement:
    """Return the position of this process, according to its environment variables."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return Placement(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]))
    world_size = int(env.get("SLURM_STEP_NUM_TASKS", 1))  # set by srun, but not in a batch script
    return Placement(int(env["SLURM_PROCID"]), world_size, slurm_tasks()) if world_size > 1 else Placement()


def trainer_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of Lightning's Trainer that describe the started processes.

    Args:
        section: the section `trainer` of a run's config.

    Raises:
        UserError: the section describes other processes.
    """
    _, world_size, local_world_size = placement()
    if world_size == 1:
        if (nodes := section.get("num_nodes", 1)) != 1:
            raise UserError(f"trainer.num_nodes={nodes}: start runs on several machines with torchrun or srun.")
        return {}
    if (devices := section.get("devices", 1)) not in (1, -1, "auto", local_world_size):
        problem = f"trainer.devices={devices}: {local_world_size} processes were started on this machine"
        raise UserError(f"{problem}. Remove the setting, or use the same number.")
    strategy = section.get("strategy", "auto")
    strategy = "ddp" if strategy == "auto" else strategy
    return {"devices": local_world_size, "num_nodes": world_size // local_world_size, "strategy": strategy}


def num_processes(section: Mapping[str, Any]) -> int:
    """Return the number of processes to launch for a run: one per device, or 1 if they are already running.

    Args:
        section: the section `trainer` of a run's config.
    """
    if section.get("devices", 1) == 1 or placement().world_size > 1:
        return 1
    import lightning as L

    chosen: dict[str, Any] = {key: section[key] for key in ("accelerator", "devices", "strategy") if key in section}
    try:
        return L.Trainer(**chosen, plugins=[environment()], logger=False, enable_checkpointing=False).world_size
    except Exception as error:  # Lightning raises many types for settings that it cannot use
        raise UserError(f"trainer.devices={section['devices']} cannot be used: {error}") from error


def environment() -> "ClusterEnvironment":
    """Return Lightning's description of the launcher. Lightning itself starts no processes, because it would run the
    whole command again in each of them.

    Raises:
        UserError: srun has no --ntasks-per-node, which Lightning requires.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    class SingleProcess(LightningEnvironment):
        creates_processes_externally = True  # pyright: ignore[reportAssignmentType]

    if placement().world_size == 1:
        return SingleProcess()
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(f"srun: use --ntasks-per-node={slurm_tasks()} instead of --ntasks.")
    return SLURMEnvironment(auto_requeue=False)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the running processes. Lightning uses the connection."""
    rank, world_size, _ = placement()
    if world_size == 1:
        yield
        return
    import torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # gloo: CPU tensors do not wait for a GPU
    cluster = environment()
    if LAUNCHED in os.environ:
        address = Path(os.environ[STORE]).as_uri()
    elif "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        address = "env://"
    else:
        address = f"tcp://{cluster.main_address}:{cluster.main_port}"
    torch.distributed.init_process_group(backend, address, rank=rank, world_size=world_size)
    yield  # after an error, the process ends, and its launcher ends the others
    torch.distributed.destroy_process_group()


def run_ranks(command: Callable[[], Any], train_run: Callable[[dict[str, Any]], Any]) -> None:
    """Run a command in one of several running processes.

    Args:
        command: the whole command, for rank 0 under torchrun or srun; its runs are sent to the other ranks.
        train_run: trains a run, described by plain data, on the other ranks and on all ranks that `launch` started.
    """
    with process_group():
        if LAUNCHED in os.environ:
            end_with_parent(int(os.environ[LAUNCHED]))
            train_run(json.loads(Path(sys.argv[1]).read_text("utf-8")))
        elif placement().rank == 0:
            try:
                command()
            except SystemExit as end:  # such as --help; after an error, torchrun ends the others
                if end.code:
                    raise
            _broadcast("")  # there are no more runs
        else:
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
                while (run := receive_run()) is not None:
                    train_run(run)


def send_run(run: Mapping[str, Any], folder: Path) -> None:
    """Under torchrun or srun, send a run, described by plain data, to the other ranks in a file in its folder."""
    if placement().world_size > 1 and LAUNCHED not in os.environ:
        with _run_file(run, folder) as file:
            _broadcast(str(file.resolve()))
            _broadcast("")  # the other ranks have read the file


def receive_run() -> Any:
    """Wait for the next run that rank 0 sends, and return it; None means that there are no more runs."""
    try:
        path = _broadcast("")
        run = json.loads(Path(path).read_text("utf-8")) if path else None
        if path:
            _broadcast("")
    except RuntimeError:  # the connection is lost because rank 0 failed, and it reports why
        sys.exit(1)
    return run


def _broadcast(text: str) -> str:
    """Return the text of rank 0. All ranks must call it."""
    if placement().world_size == 1:  # such as a job of SLURM with one task
        return text
    import torch

    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    torch.distributed.broadcast(length, 0)
    data = data if rank() == 0 else torch.zeros(int(length), dtype=torch.uint8)
    torch.distributed.broadcast(data, 0)
    return bytes(data.tolist()).decode()


@contextlib.contextmanager
def _run_file(run: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Write a run, described by plain data, to a file in its folder for the other processes."""
    file = folder / "run.json"
    files.write(file, json.dumps(run))
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def launch(run: Mapping[str, Any], folder: Path, num_processes: int) -> None:
    """Train a run in several processes on this machine, and wait for them.

    Signals that this process receives are forwarded to them.

    Args:
        run: the run, described by plain data; it is written to a file in `folder` for the processes.

    Raises:
        Interrupted: a signal stopped the processes after a checkpoint was saved.
        UserError: a process failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the error below contains the same
    loopback = _loopback()
    variables = {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # they find the same classes,
        "PYTHONSAFEPATH": "1",  # and no others (since Python 3.11)
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", loopback),
        "HYDRA_FULL_ERROR": "0",
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        LAUNCHED: str(os.getpid()),
    }
    with tempfile.TemporaryDirectory() as private, _run_file(run, folder) as file:
        variables[STORE] = str(Path(private, "store"))
        ranks = range(num_processes)
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGABRT"  # others are forwarded; torch would kill the processes
        with forwarded_signals():
            processes = start_processes(
                "train",
                sys.executable,
                {rank: ("-m", "cifarnet.train", str(file)) for rank in ranks},
                {rank: variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
                DefaultLogsSpecs(private, local_ranks_filter={0}),
            )
            try:
                result = processes.wait(period=0.1)
            finally:
                processes.close()
        if result is not None and result.failures:
            _raise_failure(result.failures, folder)


def _raise_failure(failures: "Mapping[int, ProcessFailure]", folder: Path) -> NoReturn:
    """Raise the error that a failed rank reported."""
    rank, failure = min(failures.items(), key=_precedence)
    report: dict[str, Any] = failure.error_file_data
    if report.get("status", 0) > 128:
        raise Interrupted(report["message"], report["status"])
    if "status" in report:
        kind = MachineFault if report["status"] == MACHINE_FAULT else UserError
        raise kind(f"Rank {rank} failed: {report['message']}" if rank else report["message"])
    end = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    kind = MachineFault if failure.exitcode < 0 else UserError
    raise kind(f"Rank {rank} {end}.{_resume_hint(folder)}")


def _loopback() -> str:
    """Return the name of the loopback interface, or an empty text."""
    interfaces = psutil.net_if_addrs()
    addresses = {address.address: name for name, members in interfaces.items() for address in members}
    return addresses.get("127.0.0.1", "")


def report_to_launcher(message: str, status: int = 1, is_bug: bool = False) -> bool:
    """Write an error to the file that torchrun's launcher reads. Return whether `launch` started this process, and
    therefore prints the error."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = time.time()
        report = {"message": message, "status": status, "is_bug": is_bug, "time": now, "timestamp": int(now)}
        Path(path).write_text(json.dumps(report), "utf-8")
    return LAUNCHED in os.environ


def _precedence(item: "tuple[int, ProcessFailure]") -> tuple[bool, bool, float]:
    """Order the failures of ranks: the original failure, after which other ranks lose the connection, is first."""
    _, failure = item
    report: dict[str, Any] = failure.error_file_data
    is_killed = failure.exitcode < 0 and failure.signal_name() != "SIGTERM"  # the launcher's signal to the others
    return not is_killed, report.get("is_bug", True), report.get("time", math.inf)


def _resume_hint(folder: Path) -> str:
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        return ""
    return f" Resume the run with:\n  python -m cifarnet.train ckpt_path={shlex.quote(folder.as_posix())}"


def forwarded_signals() -> contextlib.AbstractContextManager[None]:
    """Forward the signals that this process receives to its child processes, and continue to wait for them."""

    def forward(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    return handled(STOPPING, forward)


def world_size() -> int:
    """Return the number of ranks that train together; 1 without a process group."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_gather(value: "Tensor") -> "list[Tensor]":
    """Return the tensors of all ranks, in order; they may differ in length. All ranks must call it."""
    import torch

    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value.detach().cpu())
    return [member.to(value.device) for member in values]
