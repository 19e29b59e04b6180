"""A search's study: Optuna chooses the jobs of a multirun, one after the other, and may stop them early.

What is searched is written as Hydra's sweeps are: `model.hidden=128,512`, `optimizer.lr=tag(log,interval(0.001,0.1))`.
The study is a file in the multirun's folder, or in a database. Each process that runs the command takes a trial, trains
it, and takes the next, until there are enough: so several processes share a search, on any machines that see the folder
or the database, and one that was killed goes on when it is started again.
"""

import contextlib
import math
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.errors import Interrupted, UserError
from cifarnet.records.tables import Run, read_run, read_sweep
from cifarnet.schema import check
from cifarnet.sweeps import jobs, replay, search_figures
from cifarnet.sweeps.journal import JournalLock
from cifarnet.sweeps.space import asked
from cifarnet.sweeps.summary import resume_command, summarize
from cifarnet.sweeps.trials import COMMON, PLACE, check_folder, differences, here, told
from cifarnet.system import distributed, hardware

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from cifarnet.sweeps.database import Database


class Search(Sweeper):
    """A Hydra sweeper that asks an Optuna study what to run (Akiba et al., 2019, https://arxiv.org/abs/1907.10902).

    Trial n is job n. The score is the best validation accuracy; the pruner is told that of every epoch.

    Args:
        trials: how many the study is to have, all processes' and earlier ones included.
        study_name: of its folder, in the experiment's.
        params: what is searched, beside the command's own sweeps: {"optimizer.lr": "tag(log, interval(0.001, 0.1))"}.
        sampler: chooses the settings of the next trial; None: Optuna's default.
        pruner: stops a trial that is not worth going on with; None: all run to their end.
        storage: the URL of a database, such as postgresql://host/database; None: a file in the folder.
        heartbeat: seconds between signs of life in a database; after twice as long without, a process is dead.
    """

    def __init__(
        self,
        trials: int,
        study_name: str = "search",
        params: Mapping[str, str] | None = None,
        sampler: "BaseSampler | None" = None,
        pruner: "BasePruner | None" = None,
        storage: str | None = None,
        heartbeat: int = 60,
    ) -> None:
        check("hydra.sweeper.storage", storage, str | None)
        for name, number in [("trials", trials), ("heartbeat", heartbeat)]:
            check(f"hydra.sweeper.{name}", number, int)
            if number < 1:
                raise UserError(f"hydra.sweeper.{name}={number}: give 1 or more.")
        self.trials = trials
        self.study_name = study_name
        self.params = dict(params or {})
        self.sampler, self.pruner = sampler, pruner
        self.storage, self.heartbeat = storage, heartbeat

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        launcher = config.hydra.launcher["_target_"].rpartition(".")[2]
        if launcher not in ("BasicLauncher", "Slurm"):
            raise UserError(
                "A search runs one trial at a time. For several, start the same command in several terminals "
                "(with threads=… for each its share of the cores), without hydra/launcher; or hydra/launcher=slurm."
            )
        self.shared = launcher == "Slurm"  # processes elsewhere draw the trials
        self.config, self.hydra_context, self.task = config, hydra_context, task_function
        self.lock = FileLock("")  # of the trial that this process runs
        self.began = False  # this process has begun the study, or drawn a trial
        self.database: Database | None = None
        self.place = ""  # as the database knows this folder

    def sweep(self, arguments: list[str]) -> None:
        jobs.check_sweep(self.config)
        own = [f"{key}={value}" for key, value in self.params.items()]
        fixed, space = asked([*own, *arguments], self.hydra_context.config_loader)
        self._compose_all(fixed, space)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        own = [line for line in fixed if not (line.startswith("sweep.") or replay.addresses(line))]
        common = {"fixed": own, "space": {key: str(of) for key, of in space.items()}}
        study = self._open(folder, common)
        with self.database.blamed() if self.database else contextlib.nullcontext():
            check_folder(study, folder)
            self._run(study, arguments, fixed, space, folder)

    def _run(
        self,
        study: "Study",
        arguments: list[str],
        fixed: Sequence[str],
        space: "dict[str, BaseDistribution]",
        folder: Path,
    ) -> None:
        """Trial after trial; then what all have found."""
        jobs.begin(self.config, folder)
        alone = self.config.trainer.devices == 1 and distributed.placement().world_size == 1
        if self.config.trainer.accelerator != "cpu" and alone and not self.shared:
            hardware.claim_gpu()
        failures = []
        try:
            if self.shared:
                self._share(study, arguments, folder)
            while not (self.shared or jobs.stop_file(folder).exists()):
                if (trial := self._next(study, space, folder)) is None:
                    break
                settings = [f"{key}={value}" for key, value in trial.params.items()]
                # with jobs.resume a trial that was cut off goes on
                result = self._launch(trial, [*fixed, *settings, f"sweep.resume={cli.literal(str(folder))}"])
                run = read_run(folder / str(trial.number))
                self._tell(study, trial, run)
                outcome = f"{run.score:.2%}" if run.status == "done" else run.status
                print(f"Trial {trial.number + 1} of {self.trials}: {outcome}  {' '.join(settings)}", flush=True)
                if result.status == JobStatus.FAILED:
                    failures.append(result)
        except Interrupted as stopped:
            raise Interrupted(stopped.what, stopped.status, self._command(folder)) from None
        finally:
            self.lock.release()
            with self.journal:  # nobody takes a trial while its lock is looked at
                trials = told(study, folder, self.place, self.database)
            summarize(folder, self.trials, self._command(folder), trials)
            search_figures.draw(study, folder)
        for failure in failures:
            jobs.raise_failure(failure)

    def _share(self, study: "Study", arguments: list[str], folder: Path) -> None:
        """Let the launcher's processes draw and run the trials.

        Raises:
            UserError: some are missing, or failed.
        """

        def missing() -> int:
            return self.trials - sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))

        if (most := missing()) > 0:
            self._launcher(self.task).share(arguments, most)
        if (left := missing()) > 0:
            raise UserError(f"{left} of {self.trials} trials are missing: the processes that ran them have ended.")
        for run in read_sweep(folder):
            if run.status == "failed":
                raise UserError(f"Trial {run.folder.name} failed: {run.note}")

    def _command(self, folder: Path) -> str:
        """What goes on with this search: what began it, or went on with it."""
        if self.config.sweep.resume is not None:
            storage = "" if self.storage is None else f" {shlex.quote(f'hydra.sweeper.storage={self._written()}')}"
            return resume_command(folder) + storage
        return shlex.join(["python", "-m", "cifarnet.search", *sys.argv[1:]])

    def _launch(self, trial: "Trial", overrides: list[str]) -> JobReturn:
        """Train it, in this process, which tells the trial how it goes."""
        with self.database.beating(trial._trial_id) if self.database else contextlib.nullcontext():
            [result] = self._launcher(partial(self.task, trial=trial)).launch([overrides], initial_job_idx=trial.number)
        return result

    def _launcher(self, task: TaskFunction) -> Any:
        return Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=task, config=self.config
        )

    def _written(self) -> str:
        """The database's URL as the command has it, which may name a variable that holds a password."""
        return str(OmegaConf.to_container(self.config.hydra.sweeper)["storage"])

    def _compose_all(self, fixed: Sequence[str], space: "Mapping[str, BaseDistribution]") -> None:
        """Each choice, and one end of each range, so that a wrong key is told before anything runs."""
        ends = {key: getattr(of, "choices", None) or (of.low,) for key, of in space.items()}
        first = {key: values[0] for key, values in ends.items()}
        for key, values in ends.items():
            for value in values:
                settings = [f"{name}={of}" for name, of in (first | {key: value}).items()]
                self.validate_batch_is_legal([[*fixed, *settings]])

    def _open(self, folder: Path, common: dict[str, Any]) -> "Study":
        """The study; a new one, if there is none.

        Raises:
            UserError: it cannot be opened, or its trials are not comparable with these.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", ".*is already reported.*")  # by a process that was cut off
        self.journal = FileLock(folder / "study.lock")
        with self.journal:
            if self.storage is None:
                return self._in_journal(folder, common)
            from cifarnet.sweeps import database

            database.refuse_password(self._written())
            self.place = here(folder)
            self.database = database.connect(self.storage, self.heartbeat)
            with self.database.blamed():
                return self._begin(self.database, f"{self.config.name}/{self.study_name}", common)

    def _in_journal(self, folder: Path, common: dict[str, Any]) -> "Study":
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        file = folder / "study.journal"
        try:
            storage = JournalStorage(JournalFileBackend(str(file), JournalLock(self.journal, file)))
            names = optuna.get_all_study_names(storage)
            return self._begin(storage, names[0] if names else folder.name, common)  # the folder may have been renamed
        except UserError:
            raise
        except Exception as error:  # a journal may hold anything
            raise UserError(
                f"{file} cannot be read as a study ({type(error).__name__}: {error}). Move its folder away, "
                "or choose another with hydra.sweep.dir=…"
            ) from error

    def _begin(self, storage: "BaseStorage", name: str, common: dict[str, Any]) -> "Study":
        """The storage's study of that name, or a new one."""
        import optuna
        from optuna.pruners import NopPruner

        chosen = {"sampler": self.sampler, "pruner": self.pruner or NopPruner()}
        try:
            study = optuna.create_study(study_name=name, storage=storage, direction="maximize", **chosen)
            self.began = True  # its first draws are the seed's; other processes, and later ones, draw others
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage, **chosen)
        saved = study.user_attrs.get(COMMON)
        if saved is None:
            study.set_user_attr(COMMON, common)
        elif differing := differences(saved, common):
            raise UserError(
                f"The study {name} is about other settings: {differing}. Give the command as it was, "
                "or another hydra.sweeper.study_name."
            )
        return study

    def _next(self, study: "Study", space: "dict[str, BaseDistribution]", folder: Path) -> "Trial | None":
        """One that a killed process left behind, else a new one, else None. A process at work on one holds its lock.

        Locks do not reach other machines: of what runs there nothing but its heartbeat is known, which is waited for
        before this process ends.
        """
        self.lock.release()
        first: dict[int, datetime] = {}
        while True:
            with self.journal:
                trial, silent = self._left_behind(study, space, folder)
                if (trial := trial or self._draw(study, space, folder)) is not None:
                    if self.database:
                        trial.set_user_attr(PLACE, self.place)
                    return trial
            if silent and not first:
                numbers = ", ".join(str(number + 1) for number in silent)
                print(f"Waiting for a sign of life of what runs elsewhere: trial {numbers}", flush=True)
            if not any(first.setdefault(number, beat) == beat for number, beat in silent.items()):
                return None
            time.sleep(self.heartbeat / 2)

    def _left_behind(
        self, study: "Study", space: "dict[str, BaseDistribution]", folder: Path
    ) -> "tuple[Trial | None, dict[int, datetime]]":
        """A trial whose process has died, locked; and when those gave a sign of life that may yet turn out so."""
        from optuna.trial import Trial, TrialState

        silent = {}
        for left in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not self._claim(folder, left.number):
                continue
            if self.database:
                beat, dead = self.database.heard(left._trial_id)
                dead |= left.user_attrs.get(PLACE) == self.place  # it would hold its lock
                if not (dead and self.database.take_over(left._trial_id, beat)):
                    silent[left.number] = beat
                    self.lock.release()
                    continue
            if left.distributions == space:
                print(f"Trial {left.number + 1} was cut off: goes on", flush=True)
                return Trial(study, left._trial_id), silent
            study.tell(left.number, state=TrialState.FAIL)  # killed before it had settings
            self.lock.release()
        return None, silent

    def _draw(self, study: "Study", space: "dict[str, BaseDistribution]", folder: Path) -> "Trial | None":
        """A new trial, locked, unless there are enough. One that was enqueued counts once it begins."""
        from optuna.trial import TrialState

        def begun() -> list[int]:
            trials = study.get_trials(deepcopy=False)
            return [trial.number for trial in trials if trial.state != TrialState.WAITING]

        if len(begun()) >= self.trials:
            return None
        if not self.began:
            study.sampler.reseed_rng()  # else this process would draw what the first one did
        self.began = True
        trial = study.ask(space)
        if self.database:
            self.database.record_heartbeat(trial._trial_id)
            if sum(number < trial.number for number in begun()) >= self.trials:  # another machine drew the last one
                self.database.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                return None
        self._claim(folder, trial.number)
        return trial

    def _claim(self, folder: Path, number: int) -> bool:
        """Lock a trial for as long as this process lives, or until the next one, if no other process has."""
        self.lock = FileLock(folder / f"{number}.lock")
        with contextlib.suppress(Timeout):
            self.lock.acquire(blocking=False)
        return self.lock.is_locked

    @staticmethod
    def _tell(study: "Study", trial: "Trial", run: Run) -> None:
        from optuna.trial import TrialState

        if run.status == "pruned":
            told = {"state": TrialState.PRUNED}
        else:
            told = {"values": run.score} if math.isfinite(run.score) else {"state": TrialState.FAIL}
        study.tell(trial, **told, skip_if_finished=True)  # by another machine, while this one was cut off
