"""Jobs of a sweep, or the processes of a search, in SLURM's queue, by submitit.

That a job is over is seen in the queue, and what came of it in its folder: what SLURM kills tells nobody. SLURM asks a
job to stop by a signal, before its time is over (USR2, by `--signal`) or when it is preempted (TERM). One handler
answers: `callbacks.stopping` finishes the batch and saves. Then the job is queued again, by itself or by SLURM,
and goes on in its folder.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import OmegaConf

from cifarnet import cli
from cifarnet.errors import Interrupted, UserError
from cifarnet.records.json_file import read
from cifarnet.records.tables import Run, read_run
from cifarnet.sweeps import jobs
from cifarnet.sweeps.parallel import SIGNALS
from cifarnet.sweeps.summary import resume_command
from cifarnet.system import distributed, files

RECORD = "slurm.json"  # in the sweep's folder: each job's number and SLURM's name for it
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
LONGEST = 30  # seconds between two looks at the queue
Tasks = Mapping[int, Callable[[], None]]


class Slurm(SlurmLauncher):
    """Hydra's launcher by submitit, which waits for all jobs, whatever becomes of one, and lets them go on.

    Args:
        params: submitit's, as in configs/hydra/launcher/slurm.yaml.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        folder, hydra, tasks = self._folder(), Singleton.get_state(), {}
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        for number, overrides in zip(numbers, job_overrides, strict=True):
            if not self._is_done(overrides, folder / str(number)):
                tasks[number] = partial(self.train, list(overrides), number, hydra)
        self._run(tasks, lambda number: read_run(folder / str(number)), resumed=self.config.sweep.resume is not None)
        return [_result(folder / str(number)) for number in numbers]

    def share(self, arguments: list[str], most: int) -> None:
        """Let processes share a search: as many as may run at a time, and no more than `most`."""
        config, state = self.config.copy(), Singleton.get_state()
        OmegaConf.update(config, "hydra.launcher", {"_target_": BASIC}, merge=False, force_add=True)
        config.sweep.resume = config.hydra.sweep.dir
        task = partial(_search, self.hydra_context, self.task_function, config, arguments, state)
        self._run(dict.fromkeys(range(min(most, self.params["array_parallelism"])), task), None, resumed=True)

    def follow(self, job: Any) -> None:
        """What ranks other than 0 do for a run."""
        raise NotImplementedError

    def train(self, overrides: list[str], number: int, state: Any) -> None:
        """What a job of a sweep does."""
        if restarts():
            overrides = [*overrides, f"sweep.resume={cli.literal(str(self._folder()))}"]
        jobs.raise_failure(self(overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", state))

    def _folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def _is_done(self, overrides: Sequence[str], folder: Path) -> bool:
        """A job of a sweep that is resumed, which needs no place in the queue."""
        if self.config.sweep.resume is None or not (run := read_run(folder)).record:
            return False
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        if done := jobs.is_done(run, OmegaConf.to_container(config)):
            print(f"Job {folder.name} is done: {run.score:.2%}", flush=True)
        return done

    def _run(self, tasks: Tasks, read_job: Callable[[int], Run] | None, resumed: bool) -> None:
        """Submit what is not in the queue yet, and wait until nothing is.

        Args:
            read_job: what came of a job, to be told.

        Raises:
            UserError: SLURM does not answer, or jobs of another sweep in this folder are in the queue.
            Interrupted: by Ctrl-C or SIGTERM; the jobs stay in the queue.
        """
        if not tasks:
            return
        record, queue = self._folder() / RECORD, queued(waits=False)
        before = _recorded(record)
        names = {number: before[str(number)] for number in tasks if before.get(str(number)) in queue}
        if names and not resumed:
            raise UserError(f"Jobs of the sweep in {self._folder()} are in SLURM's queue. Give jobs.resume=…")
        if names:
            print(f"In SLURM's queue already: {', '.join(names.values())}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it is known what is in the queue
        try:
            names |= self._submit({number: task for number, task in tasks.items() if number not in names})
            files.write(record, json.dumps(before | {str(number): name for number, name in names.items()}))
            with stopped_by(*SIGNALS):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                self._wait(names, read_job)
        except Interrupted as stopped:
            cancel = f"scancel {' '.join(sorted({name.partition('_')[0] for name in names.values()}))}"
            what = f"{stopped.what} The jobs go on in SLURM's queue; they save and end with {cancel}."
            raise Interrupted(what, stopped.status, resume_command(self._folder())) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _submit(self, tasks: Tasks) -> dict[int, str]:
        """Give them to SLURM, as an array. Its names for them."""
        if not tasks:
            return {}
        import submitit

        params = {key: value for key, value in self.params.items() if value is not None}
        folder, most, python = (params.pop(key, None) for key in ("submitit_folder", "max_num_timeout", "python"))
        if "cpus_per_task" in params:  # srun does not take it from sbatch
            params["setup"] = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *params.get("setup", [])]
        common = set(OmegaConf.structured(BaseQueueConf))
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_python=python)
            executor.update_parameters(**{key if key in common else f"slurm_{key}": params[key] for key in params})
            jobs = executor.submit_array([Task(task, self.follow, most or 0) for task in tasks.values()])
        except (RuntimeError, ValueError, NameError, OSError) as error:
            raise UserError(f"hydra/launcher: {' '.join(str(error).split())}") from error
        names = [job.job_id for job in jobs]
        several = f" to {names[-1]}" if len(names) > 1 else ""
        print(f"In SLURM's queue: {names[0]}{several}. What they print: {jobs[0].paths.folder.parent}", flush=True)
        return dict(zip(tasks, names, strict=True))

    def _wait(self, names: Mapping[int, str], read_job: Callable[[int], Run] | None) -> None:
        """Until none is in the queue. What came of each is told."""
        left, missed, pause = dict(names), set(), 1.0
        while left:
            time.sleep(pause)
            pause, queue = min(LONGEST, 1.3 * pause), queued()
            for number in [number for number, name in left.items() if name not in queue]:
                run = read_job and read_job(number)
                if run and run.status == "cut off" and number not in missed:  # a shared disk may show its files late
                    missed.add(number)
                    continue
                name = left.pop(number)
                if run and run.status == "cut off":
                    printed = self.params["submitit_folder"].replace("%j", name)
                    print(
                        f"Job {number} was ended: SLURM says {state(name)}. See {os.path.relpath(printed)}", flush=True
                    )
                elif run:
                    outcome = f"{run.score:.2%}" if run.status == "done" else f"{run.status}: {run.note}"
                    print(f"Job {number}: {outcome}", flush=True)


class Task:
    """What submitit calls in a SLURM job: the work, and what comes after a signal.

    Args:
        work: in rank 0.
        follow: in the other ranks, each run that the first begins.
        most: restarts, after which time that is over ends the job.
    """

    def __init__(self, work: Callable[[], None], follow: Callable[[Any], None], most: int) -> None:
        self.work, self.follow, self.most = work, follow, most

    def __call__(self) -> None:
        cli.run(self._run)

    def _run(self) -> None:
        try:
            with stopped_by(signal.SIGTERM, signal.SIGUSR2):  # submitit's handler would leave in the middle of a step
                distributed.run(self.work, self.follow)
        except Interrupted as stopped:
            raise Interrupted(f"{stopped.what} {self._queue_again()}", stopped.status) from None

    def _queue_again(self) -> str:
        """If SLURM only warned this job: one that it ends, or queues again itself, is not running any more."""
        import submitit

        name = submitit.JobEnvironment().job_id
        if os.environ["SLURM_PROCID"] != "0":
            return ""
        if state(name) != "RUNNING":
            return "SLURM ends this job, and queues it again if it was requeued."
        if restarts() >= self.most:
            return f"It was restarted {restarts()} times: not again (hydra.launcher.max_num_timeout)."
        asked = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
        if asked.returncode > 0:  # below 0: SLURM ends all of this job's processes, this one too
            return f"SLURM does not queue it again: {asked.stderr.strip()}"
        return "It is in SLURM's queue again."


def restarts() -> int:
    """How often this job was queued again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


class Silent(UserError):
    """SLURM does not answer."""


def squeue(*options: str) -> list[str]:
    """Lines about jobs.

    Raises:
        Silent: there are none.
    """
    command = ["squeue", "--me", "--array", "--noheader", *options]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"hydra/launcher=slurm: {error}. Is this a machine that gives SLURM its jobs?") from error
    if told.returncode:
        raise Silent(f"hydra/launcher=slurm: SLURM does not answer: {' '.join(told.stderr.split())}")
    return told.stdout.split("\n")[:-1]


def state(name: str) -> str:
    """SLURM's word for how a job is; "nothing" once it has forgotten it."""
    with contextlib.suppress(Silent):  # of a forgotten one it says that the name is invalid
        return next(iter(squeue("--states=all", f"--jobs={name}", "--format=%T")), "nothing")
    return "nothing"


def queued(waits: bool = True) -> set[str]:
    """SLURM's names for the jobs that wait, run, or come to an end.

    Args:
        waits: until it answers; else it is an error.
    """
    while True:
        try:
            return set(squeue("--format=%i"))
        except Silent as error:
            if not waits:
                raise
            print(f"{error}. Asking again in {LONGEST} s.", flush=True)
            time.sleep(LONGEST)


@contextlib.contextmanager
def stopped_by(*numbers: int) -> Iterator[None]:
    """Meanwhile, these signals raise `Interrupted`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"Stopped by {signal.Signals(number).name}.", 128 + number)

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _search(context: Any, task: Any, config: Any, arguments: list[str], state: Any) -> None:
    """What a process of a search does."""
    Singleton.set_state(state)
    setup_globals()
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task, config=config)
    sweeper.sweep(arguments)


def _recorded(path: Path) -> dict[str, Any]:
    content = read(path, json.loads) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _result(folder: Path) -> JobReturn:
    """What Hydra is to be told of a job."""
    run, result = read_run(folder), JobReturn()
    ended = run.status == "cut off" and not jobs.stop_file(folder.parent).exists()
    result.status = JobStatus.FAILED if ended or run.status in ("failed", "damaged") else JobStatus.COMPLETED
    error = UserError(run.note or f"Job {folder.name} was ended before it was done.")
    result.return_value = run.score if result.status == JobStatus.COMPLETED else error
    return result
