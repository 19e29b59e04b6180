"""Run the jobs of a sweep, or the processes of a search, in SLURM's queue, with submitit.

The queue shows when a job has ended. The files in the job's folder show how it ended, because a job that SLURM kills
reports nothing. SLURM asks a job to stop with a signal: USR2 before its time limit (`--signal`), or TERM when it is
preempted. The callback `StopOnSignal` then finishes the batch and saves a checkpoint. The job or SLURM queues the job
again, and it continues in its folder.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.errors import Interrupted, UserError, reason
from cifarnet.records.tables import Run, read_run
from cifarnet.sweeps import jobs, multirun, parallel, task
from cifarnet.sweeps.summary import resume_command
from cifarnet.system import distributed, files
from cifarnet.system.signals import interrupting

NAMES = "slurm.json"  # in the sweep's folder: SLURM's name for each job
LONGEST = 30  # seconds between two queries of the queue
Work = Callable[[], Any]


class Slurm(SlurmLauncher):
    """Hydra's submitit launcher, extended: it waits until all jobs have ended, and its jobs continue after a restart.

    Args:
        params: the parameters of submitit, as in configs/hydra/launcher/slurm.yaml.
    """

    config: DictConfig
    hydra_context: HydraContext
    task_function: task.Task

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run jobs of a sweep. Finished jobs of a resumed sweep are not queued again."""
        state, tasks = Singleton.get_state(), {}
        numbered = dict(enumerate(job_overrides, initial_job_idx))
        for number, overrides in numbered.items():
            if self.config.sweep.resume and self._read_job(number).status == "done":
                print(f"Job {number} is done", flush=True)
            else:
                tasks[number] = partial(self.run_job, list(overrides), number, state)
        self._run(tasks, is_search=False)
        return [_result(self._read_job(number)) for number in numbered]

    def launch_search(self, arguments: list[str], most: int) -> None:
        """Run at most this number of processes that share a search."""
        config = self.config.copy()
        basic = ConfigStore.instance().load("hydra/launcher/basic.yaml").node
        OmegaConf.update(config, "hydra.launcher", basic, merge=False, force_add=True)
        config.sweep.resume = config.hydra.sweep.dir
        work = partial(_search, self.hydra_context, self.task_function, config, arguments, Singleton.get_state())
        self._run(dict.fromkeys(range(min(most, self.params["array_parallelism"])), work), is_search=True)

    def run_job(self, overrides: list[str], number: int, state: Any) -> None:
        """Run a job of a sweep in this process."""
        if num_restarts() > 0:
            overrides = [*overrides, f"sweep.resume={cli.literal(self.config.hydra.sweep.dir)}"]
        jobs.raise_first_failure([self(overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", state)])

    def _train_run(self, run: dict[str, Any]) -> None:
        """Take part in the training of a run that rank 0 of a SLURM job describes."""
        self.task_function.train(OmegaConf.create(run["config"]), run["ckpt_path"])

    def _read_job(self, number: int) -> Run:
        return read_run(Path(self.config.hydra.sweep.dir, str(number)))

    def _run(self, tasks: Mapping[int, Work], is_search: bool) -> None:
        """Submit the tasks that are not in the queue yet, and wait until no task is in the queue.

        Raises:
            UserError: SLURM does not respond, or jobs of another sweep in this folder are in the queue.
            Interrupted: Ctrl-C or SIGTERM stopped the sweep. The jobs remain in the queue.
        """
        if not tasks:
            return
        folder = Path(self.config.hydra.sweep.dir)
        path, queue = folder / NAMES, queued()
        recorded = files.read(path, json.loads) if path.exists() else {}
        names = {number: recorded[str(number)] for number in tasks if recorded.get(str(number)) in queue}
        if names and not (is_search or self.config.sweep.resume):
            raise UserError(
                f"Jobs of the sweep in {folder} are still in SLURM's queue. To wait for them: {resume_command(folder)}"
            )
        if names:
            print(f"Already in SLURM's queue: {', '.join(names.values())}", flush=True)
        try:
            with interrupting(parallel.SIGNALS):
                signal.pthread_sigmask(signal.SIG_BLOCK, parallel.SIGNALS)  # until the names are recorded
                names |= self._submit({number: work for number, work in tasks.items() if number not in names})
                files.write(path, json.dumps(recorded | {str(number): name for number, name in names.items()}))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, parallel.SIGNALS)
                self._wait(names, is_search)
        except Interrupted as stopped:
            arrays = " ".join(sorted({name.partition("_")[0] for name in names.values()}))
            what = f"{stopped.what} The jobs remain in SLURM's queue. To let them save and end: scancel {arrays}."
            raise Interrupted(what, stopped.status, resume_command(folder)) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, parallel.SIGNALS)

    def _submit(self, tasks: Mapping[int, Work]) -> dict[int, str]:
        """Submit tasks as a job array, and return SLURM's names for them."""
        if not tasks:
            return {}
        import submitit

        params = {key: value for key, value in self.params.items() if value is not None}
        folder, restarts, python = (params.pop(key, None) for key in ("submitit_folder", "max_num_timeout", "python"))
        if "cpus_per_task" in params:  # srun does not inherit it from sbatch
            params["setup"] = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *params.get("setup", [])]
        common = set(OmegaConf.structured(BaseQueueConf))
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_python=python)
            executor.update_parameters(**{key if key in common else f"slurm_{key}": params[key] for key in params})
            array = executor.submit_array([Task(work, self._train_run, restarts or 0) for work in tasks.values()])
        except (RuntimeError, ValueError, NameError, OSError) as error:
            raise UserError(f"hydra/launcher: {reason(error)}.") from error
        names = [job.job_id for job in array]
        last = f" to {names[-1]}" if len(names) > 1 else ""
        print(f"In SLURM's queue: {names[0]}{last}. Their output: {array[0].paths.folder.parent}", flush=True)
        return dict(zip(tasks, names, strict=True))

    def _wait(self, names: Mapping[int, str], is_search: bool) -> None:
        """Wait until no job is in the queue, and print how each job of a sweep ended."""
        waiting, late, pause = dict(names), set(), 1.0
        while waiting:
            time.sleep(pause)
            pause = min(LONGEST, 1.3 * pause)
            try:
                queue = queued()
            except UserError as error:
                print(f"{error} Trying again in {pause:.0f} s.", flush=True)
                continue
            for number in [number for number, name in waiting.items() if name not in queue]:
                run = self._read_job(number)
                if run.status == "cut off" and number not in late and not is_search:
                    late.add(number)  # files can appear late on a shared disk
                    continue
                name = waiting.pop(number)
                if not is_search:
                    print(f"Job {number}: {self._ending(run, name)}", flush=True)

    def _ending(self, run: Run, name: str) -> str:
        if run.status == "cut off":
            output = os.path.relpath(self.params["submitit_folder"].replace("%j", name))
            return f"ended by SLURM (state {state(name)}). See {output}"
        return f"{run.score:.2%}" if run.status == "done" else f"{run.status}: {run.note}"


class Task:
    """The function that submitit calls in each process of a SLURM job.

    Args:
        work: the function to call in rank 0.
        train_run: the function to call in the other ranks, with each run that rank 0 trains.
        max_restarts: the number of restarts after which the job ends at its time limit.
    """

    def __init__(self, work: Work, train_run: Callable[[dict[str, Any]], Any], max_restarts: int) -> None:
        self.work, self.train_run, self.max_restarts = work, train_run, max_restarts

    def __call__(self) -> None:
        cli.run(self._run)

    def _run(self) -> None:
        try:
            with interrupting([signal.SIGTERM, signal.SIGUSR2]):  # submitit's handler would end a step midway
                distributed.run_ranks(self.work, self.train_run)
        except Interrupted as stopped:
            raise Interrupted(f"{stopped.what} {self._queue_again()}", stopped.status) from None

    def _queue_again(self) -> str:
        """Queue the job again unless SLURM is already ending it, and return a message."""
        import submitit

        if os.environ["SLURM_PROCID"] != "0":
            return ""
        name = submitit.JobEnvironment().job_id
        if state(name) != "RUNNING":
            return "SLURM is ending this job. If SLURM requeued it, it will start again."
        if num_restarts() >= self.max_restarts:
            limit = "it will not be restarted again (hydra.launcher.max_num_timeout)"
            return f"Restarted {num_restarts()} times, {limit}."
        requeue = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
        if requeue.returncode > 0:  # negative if SLURM ends this job's processes, including scontrol
            return f"SLURM will not queue it again: {requeue.stderr.strip()}"
        return "It is in SLURM's queue again."


def num_restarts() -> int:
    """Return the number of times that this SLURM job was restarted."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def queued() -> set[str]:
    """Return SLURM's names for the jobs that are waiting, running or ending."""
    return set(_squeue("--format=%i"))


def state(name: str) -> str:
    """Return the name of a job's state in SLURM, such as RUNNING."""
    with contextlib.suppress(UserError):  # squeue fails for jobs that SLURM no longer lists
        return next(iter(_squeue("--states=all", f"--jobs={name}", "--format=%T")), "unknown")
    return "unknown"


def _squeue(*options: str) -> list[str]:
    """Return the lines that squeue prints.

    Raises:
        UserError: SLURM does not respond.
    """
    command = ["squeue", "--me", "--array", "--noheader", *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"hydra/launcher=slurm: {error}. Run the command on a machine that can submit jobs to SLURM."
        ) from error
    if result.returncode:
        raise UserError(f"hydra/launcher=slurm: SLURM does not respond: {' '.join(result.stderr.split())}.")
    return result.stdout.split("\n")[:-1]


def _search(context: HydraContext, task: TaskFunction, config: DictConfig, arguments: list[str], state: Any) -> None:
    """Run a process of a search."""
    Singleton.set_state(state)
    setup_globals()
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task, config=config)
    sweeper.sweep(arguments)


def _result(run: Run) -> JobReturn:
    """Return the result of a job in the form that Hydra expects from a launcher."""
    result = JobReturn(status=JobStatus.COMPLETED)
    is_stopped = multirun.stop_file(run.folder.parent).exists()
    if run.status in ("failed", "damaged") or (run.status == "cut off" and not is_stopped):
        result.status = JobStatus.FAILED
        result.return_value = UserError(run.note or f"Job {run.folder.name} ended before it was finished.")
    else:
        result.return_value = jobs.Outcome("done", run.score) if run.status == "done" else jobs.Outcome("skipped")
    return result
