"""A job of a sweep: the steps before and after its training.

The job's folder holds Hydra's record of its overrides and, at the end, `metrics.json`, `pruned.txt` or `error.txt`
(`records.tables` reads them).
"""

import contextlib
import io
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.config import deciding_settings
from cifarnet.errors import Diverged, Interrupted, Pruned, TakenOver, UserError, printable
from cifarnet.records.tables import read_run
from cifarnet.sweeps import multirun, parallel
from cifarnet.sweeps.summary import clear_checkpoints, resume_command
from cifarnet.system import distributed, files

if TYPE_CHECKING:
    from optuna import Trial

    from cifarnet.checkpoint import Checkpoint
    from cifarnet.data.shared_images import SharedImages
    from cifarnet.records.record import Record


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        status: "interrupted" by a signal; "skipped" if the sweep was stopped before the job started.
        score: the best validation accuracy, from 0 to 1; NaN if the job is not done.
    """

    status: Literal["done", "pruned", "failed", "interrupted", "skipped"]
    score: float = math.nan

    def __float__(self) -> float:  # for sweepers of other packages
        return self.score

    def __str__(self) -> str:
        return f"{self.score:.2%}" if self.status == "done" else self.status


def is_job() -> bool:
    """Whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def refuse_launcher() -> None:
    """Raise a UserError if a launcher or a setting of the sweeper is set for a single run, which would ignore it."""
    if (name := HydraConfig.get().runtime.choices["hydra/launcher"]) != "basic":
        raise UserError(f"hydra/launcher={name} launches the jobs of a sweep. Add -m. (A sweep can have a single job.)")
    for name in ("zip", "dry_run"):
        if HydraConfig.get().sweeper.get(name):
            raise UserError(f"hydra.sweeper.{name}=true applies to a sweep. Add -m. (A sweep can have a single job.)")


def uses_one_device(config: DictConfig) -> bool:
    """Whether a run trains on one device, in one process."""
    return config.trainer.devices == 1 and distributed.placement().world_size == 1


def run_job(
    config: DictConfig,
    train: "Callable[..., Record]",
    trial: "Trial | None" = None,
    images: "SharedImages | None" = None,
) -> Outcome:
    """Train as a job of a sweep.

    In a resumed sweep, a finished job does not run again, and an interrupted job continues from its checkpoint.

    Raises:
        Interrupted: a signal stopped the job after it saved; the message contains the command that resumes the sweep.
        UserError: the job failed. The message is also written to `error.txt`.
    """
    folder = Path(config.output_dir)
    if multirun.stop_file(folder.parent).exists():
        files.remove_if_unused(folder)
        return Outcome("skipped")
    if config.sweep.resume is not None and "read_only" not in config.data:
        from cifarnet.resuming import make_read_only  # imports torch

        make_read_only(config)
    pruning = (Pruned,) if trial is None else (Pruned, Diverged)
    with parallel.job_in_worker(config, folder.name):
        try:
            (folder / "error.txt").unlink(missing_ok=True)
            score, checkpoint = _previous_session(config, folder)
            if score is None:
                (folder / "metrics.json").unlink(missing_ok=True)  # it is damaged
                score = train(config, checkpoint, _callbacks(config, trial), images).val_accuracy
            if trial is not None and math.isnan(score):
                remedy = "Validate in at least one epoch: check trainer.limit_val_batches and check_val_every_n_epoch."
                raise UserError(f"The run has no validation accuracy, by which a search compares its trials. {remedy}")
        except pruning as reason:
            print(printable(f"Job {folder.name} is pruned: {reason}"), flush=True)
            files.write(folder / "pruned.txt", f"{reason}\n")
            if isinstance(reason, Pruned):
                files.remove_checkpoints(folder)
            return Outcome("pruned")
        except TakenOver:
            return Outcome("interrupted")
        except Interrupted as stopped:
            if parallel.is_worker():  # the sweep's process reports the signal after all jobs have saved
                return Outcome("interrupted")
            raise Interrupted(stopped.what, stopped.status, resume_command(folder.parent)) from None
        except Exception as error:
            if config.sweep.stop_at_failure:
                multirun.stop_file(folder.parent).touch()
            raise UserError(_report_failure(folder, error, is_trial=trial is not None)) from error
    clear_checkpoints(folder.parent, config.sweep.keep_checkpoints)
    return Outcome("done", score)


def outcome(result: JobReturn) -> Outcome:
    """Return the outcome of a job that Hydra ran. A fault of the machine interrupts a job; it is not a result."""
    try:
        raise_first_failure([result])
    except Exception as error:
        return Outcome("interrupted" if cli.is_machine_fault(error) else "failed")
    return result.return_value


def raise_first_failure(results: Iterable[JobReturn]) -> None:
    """Raise the error of the first job that failed."""
    with contextlib.redirect_stderr(io.StringIO()):  # Hydra prints the job's overrides
        for result in results:
            result.return_value  # noqa: B018


def _previous_session(config: DictConfig, folder: Path) -> "tuple[float | None, Checkpoint | None]":
    """Return the score of a finished job of a resumed sweep, or the checkpoint from which the job continues.

    If a checkpoint cannot be read, it is moved aside, and the job is trained from the beginning.
    """
    best, last = (folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    run = read_run(folder)
    if config.sweep.resume is None or not (run.record or last.is_file()):
        return None, None
    from cifarnet.checkpoint import Checkpoint
    from cifarnet.finetuning import expand

    config = expand(config)  # the recorded config is expanded, too
    if run.record and _are_equal(run.record.config, config):
        print(f"Job {folder.name} is done: {run.score:.2%}", flush=True)
        return run.score, None
    if run.status == "damaged":
        print(printable(f"Job {folder.name}: {run.note}"), flush=True)
    if not last.is_file():
        return None, None
    try:
        if best.exists():  # it is tested after training
            Checkpoint.open(best)
        checkpoint = Checkpoint.open(last)
    except UserError as error:
        os.replace(last.parent, folder / f"damaged_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
        print(printable(f"Job {folder.name} is trained from the beginning: {error}"), flush=True)
        return None, None
    if not _are_equal(checkpoint.content["hyper_parameters"]["config"], config):
        raise UserError(f"{last} belongs to a run with other settings. To train the job from the beginning, delete it.")
    print(f"Job {folder.name} continues from {os.path.relpath(last)}", flush=True)
    return None, checkpoint


def _are_equal(recorded: Mapping[str, Any], config: DictConfig) -> bool:
    """Whether two configs produce the same result."""
    written: Any = OmegaConf.to_container(config)  # as in metrics.json; checkpoints contain no resolvers
    return deciding_settings(recorded) in map(deciding_settings, (written, cli.without_resolvers(config, "logger")))


def _callbacks(config: DictConfig, trial: "Trial | None") -> list[Any]:
    """Return the callbacks of a trial. A trial on several devices is not pruned, as only this process has the trial."""
    from cifarnet.callbacks.pruning import Prune

    return [Prune(trial)] if trial is not None and uses_one_device(config) else []


def _report_failure(folder: Path, error: Exception, is_trial: bool) -> str:
    """Print an error, write it to `error.txt` (unless the machine interrupted a trial), and return its message."""
    explanation = cli.explain(error)
    if explanation is None:  # a bug
        traceback.print_exception(error)
    message = explanation or f"{type(error).__name__}: {error}"
    print(printable(f"Job {folder.name} failed: {message}"), file=sys.stderr, flush=True)
    if not (is_trial and cli.is_machine_fault(error)):
        with contextlib.suppress(OSError):  # such as a full disk
            files.write(folder / "error.txt", message + "\n")
    return message
