"""The trials of a study, which any number of processes draw and run."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from cifarnet.errors import TakenOver, UserError, as_user_error
from cifarnet.records.tables import Run, read_sweep
from cifarnet.sweeps.jobs import Outcome
from cifarnet.sweeps.storage import FOLDER, Database, Journal, trial_id
from cifarnet.system import files

STATES = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass
class Trials:
    """The trials of a study.

    A process that runs a trial holds the lock `<number>.lock` in the search's folder until the trial ends. The storage
    records heartbeats of trials that run outside this folder.

    Args:
        space: the distribution of each setting that is searched.
        folder: the search's folder.
        count: the number of trials that the study should have.
    """

    study: Study
    storage: Journal | Database
    space: dict[str, BaseDistribution]
    folder: Path
    count: int
    locks: dict[int, FileLock] = field(default_factory=dict)  # locks of trials that this process runs or could not run

    def next(self) -> Trial | None:
        """Return a trial whose process has died, or a new trial, or None if there are enough trials.

        The trial is locked.
        """
        trial = self._draw()
        if trial is None and (elsewhere := self._unlocked()):
            numbers = ", ".join(str(running.number + 1) for running in elsewhere)
            print(f"Waiting for heartbeats from other machines: trial {numbers}", flush=True)
            time.sleep(self.storage.timeout + 1)  # a database may store times in whole seconds
            trial = self._draw()
        return trial

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """Record the outcome of a trial, unless another process has taken it over.

        An interrupted trial remains open, and locked so that this process does not run it again.
        """
        try:
            self.storage.check_lease(trial_id(trial))
        except TakenOver as reason:
            print(f"Trial {trial.number + 1}: {reason}", flush=True)
        else:
            if (state := STATES.get(outcome.status)) is None:
                return
            score = outcome.score if outcome.status == "done" else None
            self.study.tell(trial, score, state, skip_if_finished=True)
        self.locks.pop(trial.number).release()

    def release(self) -> None:
        """Release all locks of this process."""
        while self.locks:
            self.locks.popitem()[1].release()

    def num_missing(self) -> int:
        """Return the number of trials that are not finished yet."""
        return self.count - sum(trial.state.is_finished() for trial in self._all())

    def runs(self, fixed: Sequence[str]) -> dict[str, Run]:
        """Return the trials that are finished or running, by number.

        Args:
            fixed: the overrides that all trials share.
        """
        statuses: dict[TrialState, str] = {state: status for status, state in STATES.items()}
        with self.storage.lock:
            dead = {trial.number for trial in self._unlocked() if self.storage.is_dead(trial)}
        pairs = (override.partition("=") for override in fixed)
        shared = {key: value for key, _, value in pairs if not key.startswith("sweep.") and key != "classes"}
        runs = {}
        for trial in self._all():
            is_running = trial.state == TrialState.RUNNING and trial.number not in dead
            if status := "running" if is_running else statuses.get(trial.state):
                settings = shared | {key: str(value) for key, value in trial.params.items()}
                place = trial.user_attrs.get(FOLDER, "")
                folder = Path(self.folder if place == self.storage.place else place, str(trial.number))
                numbers = {} if trial.value is None else {"val_accuracy": trial.value}
                runs[str(trial.number)] = Run(folder, settings, status, numbers=numbers)
        return runs

    def check_folder(self) -> None:
        """Check that the folder contains no trials of another study.

        Raises:
            UserError: the folder contains such a trial.
        """
        runs = read_sweep(self.folder)  # read before the study, to which other processes add trials
        params = {str(trial.number): trial.params for trial in self._all()}
        for run in runs:
            expected = params.get(run.folder.name)
            if expected is None or any(run.settings.get(key, str(of)) != str(of) for key, of in expected.items()):
                problem = f"{run.folder} is not a trial of the study {self.study.study_name}"
                raise UserError(f"{problem}. Choose another hydra.sweep.dir or another hydra.sweeper.study_name.")

    def _draw(self) -> Trial | None:
        with self.storage.lock:
            for trial in self._unlocked():
                if self.storage.is_dead(trial):
                    with contextlib.suppress(UpdateFinishedTrialError):  # its process is alive and has just finished it
                        self._enqueue(trial)
                        print(f"Trial {trial.number + 1} was interrupted and will be continued", flush=True)
            if self._num_begun() >= self.count:
                return None
            with as_user_error("hydra.sweeper.sampler"):
                drawn = self.study.ask(self.space)  # an enqueued trial, or a new trial
            if self._num_begun(drawn.number) >= self.count:  # another machine has drawn the last one
                self._enqueue(drawn)
                return None
            self.storage.take_lease(trial_id(drawn))
            self.locks[drawn.number] = FileLock(self._lock_file(drawn.number))
            self.locks[drawn.number].acquire()
            return drawn

    def _enqueue(self, trial: Trial | FrozenTrial) -> None:
        """Put a trial back into the queue, so that a process can draw it again."""
        self.storage.take_lease(trial_id(trial))  # from a suspended process
        self.storage.set_trial_state_values(trial_id(trial), TrialState.WAITING)

    def _num_begun(self, before: float = math.inf) -> int:
        """Return how many trials with a number below `before` are not enqueued."""
        return sum(trial.state != TrialState.WAITING and trial.number < before for trial in self._all())

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _unlocked(self) -> list[FrozenTrial]:
        """Return the running trials that no process in this folder runs."""
        running = [trial for trial in self._all() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if not files.is_locked(self._lock_file(trial.number))]

    def _lock_file(self, number: int) -> Path:
        return self.folder / f"{number}.lock"
