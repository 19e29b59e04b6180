"""Ranks: processes that train one network together, a device each, on one machine or on several.

Rank 0 leads: it reads the command, owns the run's folder, prints, writes, and draws a search's trials. The others
follow: job by job they are told a config, and train their share of every batch by it. `trainer=ddp` starts them for a
job of its own (`leading`); torchrun and srun have started all of them before (`run`).
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import yaml

from cifarnet.errors import Interrupted, UserError
from cifarnet.system.hardware import end_with_parent, slurm_tasks

if TYPE_CHECKING:  # torch and lightning take seconds to import
    import lightning as L
    from lightning.pytorch.plugins.environments import ClusterEnvironment
    from torch import Tensor
    from torch.distributed import Store

LEADER = "CIFARNET_LEADER"  # the process that started this one, which ends with it
GRACE = timedelta(seconds=10)  # in which ranks hear of each other
FOREVER = timedelta(days=365)  # until the next job begins
Job = dict[str, Any]  # plain data


class Place(NamedTuple):
    """Where a process is among those that torchrun, srun or a leading process started."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # on this machine


def place() -> Place:
    """That of this process, by its environment."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]))
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))  # set by srun, not in a batch script
    return Place(int(env["SLURM_PROCID"]), size, slurm_tasks()) if size > 1 else Place()


def trainer_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's words for the place of this process; `given` is a config's section `trainer`.

    Raises:
        UserError: the section asks for other processes than there are.
    """
    size, local_size = place()[1:]
    if LEADER in os.environ:  # started by that section
        return {}
    if size == 1:
        if (nodes := given.get("num_nodes", 1)) != 1:
            raise UserError(f"trainer.num_nodes={nodes}: on several machines, start it with torchrun or srun.")
        return {}
    if (devices := given.get("devices", 1)) not in (1, -1, "auto", local_size):
        raise UserError(
            f"trainer.devices={devices}: torchrun or srun has started {local_size} processes on this machine. "
            "Leave it out, or give the same number."
        )
    chosen = given.get("strategy", "auto")
    strategy = "ddp" if chosen == "auto" else chosen
    return {"devices": local_size, "num_nodes": size // local_size, "strategy": strategy}


def environment() -> "ClusterEnvironment":
    """Who starts the processes, for Lightning: never itself, which would begin a sweep once a rank.

    Raises:
        UserError: srun was not told how many there are on each machine.
    """
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    class Leading(LightningEnvironment):
        creates_processes_externally = True

    if place().size == 1:
        return Leading()
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_NTASKS_PER_NODE" not in os.environ:  # Lightning's demand
        raise UserError(f"Several processes by srun: give --ntasks-per-node={slurm_tasks()} in place of --ntasks.")
    return SLURMEnvironment(auto_requeue=False)


def run(lead: Callable[[], Any], work: Callable[[Job], Any]) -> Any:
    """A command: `lead` in rank 0, and `work`, for each job that it begins, in the others."""
    rank, size, _ = place()
    if size == 1:
        return lead()
    if LEADER in os.environ:
        end_with_parent(int(os.environ[LEADER]))
    _join(environment(), rank, size)
    if rank > 0:
        return _follow(rank, work)
    try:
        result = lead()  # if it fails, its end breaks the connection, which ends the others
    except SystemExit as ended:
        if not ended.code:  # --help
            _tell(None)
        raise
    _tell(None)
    _leave()
    return result


@contextlib.contextmanager
def leading(trainer: "L.Trainer", job: Job, command: str) -> Iterator[None]:
    """Meanwhile all other ranks do this job too; `command` goes on with it, once it has saved.

    Raises:
        UserError: one of them has ended.
    """
    from lightning.pytorch.strategies import DDPStrategy

    if not isinstance(trainer.strategy, DDPStrategy):
        yield
    elif place().size > 1:
        with _job(job, place().size):
            yield
    else:
        with _started(trainer, command), _job(job, trainer.world_size):
            yield


@contextlib.contextmanager
def _job(job: Job, size: int) -> Iterator[None]:
    store = _store()
    number = _tell(job)
    connected = True
    try:
        yield
    except RuntimeError as error:
        if "find_unused_parameters" in str(error):
            raise UserError("Some weights got no gradient: trainer.strategy=ddp_find_unused_parameters_true") from error
        if connected := not is_lost(error):
            raise
        raise UserError("Another rank has ended, and the connection to it with it.") from error
    finally:
        if connected:  # let the others come to the same end, which may be a failure
            with contextlib.suppress(_dist_error()):
                store.set(f"over{number}", "")
                store.wait([f"ended{number}/{rank}" for rank in range(1, size)], GRACE)


def _tell(job: Job | None) -> int:
    """Begin a job in the other ranks, or, with None, end them. Its number, from 1.

    Raises:
        UserError: they are still at work on one that has failed here.
    """
    store = _store()
    number = store.add("jobs", 1)
    if number > 1 and not store.check([f"ended{number - 1}/{rank}" for rank in range(1, place().size)]):
        raise UserError("The other ranks do not answer since a job has failed: start the command again.")
    store.set(f"job{number}", yaml.safe_dump(job, sort_keys=False))  # callbacks act in one order on all ranks
    return number


def _follow(rank: int, work: Callable[[Job], Any]) -> None:
    """Take part in each job that rank 0 begins, until it says that there is none."""
    store = _store()
    for number in itertools.count(1):
        try:
            store.wait([f"job{number}"], FOREVER)
        except _dist_error():
            sys.exit(1)  # rank 0 has failed, and said why
        job = yaml.safe_load(store.get(f"job{number}"))
        if job is None:
            return _leave()
        try:
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
                work(job)
        except Interrupted as stopped:  # told by rank 0
            store.set(f"ended{number}/{rank}", "")
            sys.exit(stopped.status)
        except Exception as error:
            try:  # what fails on all ranks alike is told by rank 0
                store.wait([f"over{number}"], GRACE)
            except _dist_error():
                raise error from None
        store.set(f"ended{number}/{rank}", "")


@contextlib.contextmanager
def _started(trainer: "L.Trainer", command: str) -> Iterator[None]:
    """Processes for the ranks of a job, on this machine, which end with it."""
    cluster, size = trainer.strategy.cluster_environment, trainer.world_size
    address = {"MASTER_ADDR": cluster.main_address, "MASTER_PORT": str(cluster.main_port)}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    env = os.environ | address | sizes | {"TORCHELASTIC_RUN_ID": "cifarnet", LEADER: str(os.getpid())}
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # the same classes are found
    over, followers = threading.Event(), []
    with contextlib.ExitStack() as said:
        for rank in range(1, size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = said.enter_context(tempfile.TemporaryFile("w+"))
            program = [sys.executable, "-m", "cifarnet.train"]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": words}
            followers.append(Follower(rank, subprocess.Popen(program, env=env | own, **quiet), words))
        watcher = threading.Thread(target=_watch, args=(followers, over), daemon=True)
        watcher.start()
        try:
            _join(cluster, 0, size)
            yield
            _tell(None)
        except UserError as error:
            time.sleep(0.5)  # until it is known how it ended
            saved = Path(trainer.default_root_dir, "checkpoints", "last.ckpt").is_file()
            raise UserError(f"{_death(followers) or error}{f' Go on with: {command}' if saved else ''}") from error
        finally:
            over.set()
            watcher.join()
            for follower in followers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    follower.process.wait(GRACE.seconds)
                follower.process.kill()
                follower.process.wait()
            _leave()


class Follower(NamedTuple):
    rank: int
    process: subprocess.Popen
    words: IO[str]  # its errors


def _watch(followers: Sequence[Follower], over: threading.Event) -> None:
    """End this process if one of the others has ended and nothing else says so: NCCL waits for it."""
    while not over.wait(0.2):
        if (message := _death(followers)) and not over.wait(3 * GRACE.seconds):
            print(f"Error: {message}", file=sys.stderr, flush=True)
            os._exit(1)


def _death(followers: Sequence[Follower]) -> str | None:
    """What is to be told of one that has ended, if one has."""
    for rank, process, words in followers:
        if (status := process.poll()) is not None and status < 0:
            return f"Rank {rank} was ended by {signal.Signals(-status).name}."
        if status:
            words.seek(0)
            told = words.read().strip()
            # an exception's line, though more of its message may follow
            errors = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+: .+)$", told, re.MULTILINE)
            return f"Rank {rank} failed: {(errors or told.splitlines() or ['it says nothing'])[-1]}"
    return None


def _join(cluster: "ClusterEnvironment", rank: int, size: int) -> None:
    """Connect with the others; Lightning finds it done."""
    import torch

    # both, for numbers on a CPU do not make a GPU wait
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    by_agent = "TORCHELASTIC_USE_AGENT_STORE" in os.environ  # torchrun's, to be found by its variables
    address = "env://" if by_agent else f"tcp://{cluster.main_address}:{cluster.main_port}"
    torch.distributed.init_process_group(backend, address, rank=rank, world_size=size)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _store() -> "Store":
    """What all ranks can read and write."""
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    return PrefixStore("jobs", _get_default_store())


def is_lost(error: Exception) -> bool:
    """Does it say that the connection to another rank is?"""
    return isinstance(error, _dist_error()) or "gloo" in str(error)


def _dist_error() -> type[Exception]:
    from torch.distributed import DistError

    return DistError


def world_size() -> int:
    """How many train together at this moment."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's, while it trains with others; else 0."""
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_gather(value: "Tensor") -> "list[Tensor]":
    """Every rank's, in their order, which may have different lengths; of one process, its own. All ranks must ask."""
    import torch

    if not torch.distributed.is_initialized():
        return [value]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value.detach().cpu())
    return [of.to(value.device) for of in every]
