"""A search's study: Optuna chooses the jobs of a multirun, one after the other, and may stop them early.

What is searched is written as Hydra's sweeps are: `model.hidden=128,512`, `optimizer.lr=tag(log,interval(0.001,0.1))`.
The study is a file in the multirun's folder. Each process that runs the command takes a trial, trains it, and takes the
next, until there are enough: so several processes share a search, on any machines that see the folder, and one that was
killed goes on when it is started again.
"""

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from cifarnet import cli, hardware, ranks
from cifarnet.errors import Interrupted, UserError
from cifarnet.runs import replay, search_figures, sweep
from cifarnet.runs.space import distribution
from cifarnet.runs.summary import resuming, summarize
from cifarnet.runs.tables import Run, read_run, read_sweep
from cifarnet.settings import check_type

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

COMMON = "common"  # the study's attribute: what its trials have in common, and what is searched


class Search(Sweeper):
    """A Hydra sweeper that asks an Optuna study what to run (Akiba et al., 2019, https://arxiv.org/abs/1907.10902).

    Trial n is job n. The score is the best validation accuracy; the pruner is told that of every epoch.

    Args:
        trials: how many the study is to have, all processes' and earlier ones included.
        study_name: of its folder, in the experiment's.
        params: what is searched, beside the command's own sweeps: {"optimizer.lr": "tag(log, interval(0.001, 0.1))"}.
        sampler: chooses the settings of the next trial; None: Optuna's default.
        pruner: stops a trial that is not worth going on with; None: all run to their end.
    """

    def __init__(
        self,
        trials: int,
        study_name: str = "search",
        params: Mapping[str, str] | None = None,
        sampler: "BaseSampler | None" = None,
        pruner: "BasePruner | None" = None,
    ) -> None:
        check_type("hydra.sweeper.trials", trials, int)
        if trials < 1:
            raise UserError(f"hydra.sweeper.trials={trials}: give 1 or more.")
        self.trials = trials
        self.study_name = study_name
        self.params = dict(params or {})
        self.sampler, self.pruner = sampler, pruner

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
        self.began = False  # this process has drawn a trial

    def sweep(self, arguments: list[str]) -> None:
        sweep.check(self.config)
        fixed, space = self._space(arguments)
        self._compose_all(fixed, space)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        own = [line for line in fixed if not (line.startswith("sweep.") or replay.addresses(line))]
        common = {"fixed": own, "space": {key: str(of) for key, of in space.items()}}
        study = self._open(folder, common)
        sweep.begin(self.config, folder)
        alone = self.config.trainer.devices == 1 and ranks.place().size == 1
        if self.config.trainer.accelerator != "cpu" and alone and not self.shared:
            hardware.claim_gpu()
        failures = []
        try:
            if self.shared:
                self._share(study, arguments, folder)
            while not (self.shared or sweep.stop_file(folder).exists()):
                if (trial := self._next(study, space, folder)) is None:
                    break
                settings = [f"{key}={value}" for key, value in trial.params.items()]
                # with sweep.resume a trial that was cut off goes on
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
            summarize(folder, self.trials, self._command(folder), search=True)
            search_figures.draw(study, folder)
        for failure in failures:
            sweep.raise_failure(failure)

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
            return resuming(folder)
        return shlex.join(["python", "-m", "cifarnet.search", *sys.argv[1:]])

    def _launch(self, trial: "Trial", overrides: list[str]) -> JobReturn:
        """Train it, in this process, which tells the trial how it goes."""
        [result] = self._launcher(partial(self.task, trial=trial)).launch([overrides], initial_job_idx=trial.number)
        return result

    def _launcher(self, task: TaskFunction) -> Any:
        return Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=task, config=self.config
        )

    def _space(self, arguments: Sequence[str]) -> tuple[list[str], "dict[str, BaseDistribution]"]:
        """The overrides that all trials share, and what each takes its values from."""
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(lines)
        overrides = {override.get_key_element(): override for override in parsed}  # the last one counts
        fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
        space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        if not space:
            raise UserError(
                "Nothing to search. Name it with +search=rates, or with values such as model.hidden=128,512 or "
                "'optimizer.lr=tag(log,interval(0.001,0.1))'."
            )
        return fixed, space

    def _compose_all(self, fixed: Sequence[str], space: "Mapping[str, BaseDistribution]") -> None:
        """Each choice, and one end of each range, so that a wrong key is told before anything runs."""
        ends = {key: getattr(of, "choices", None) or (of.low,) for key, of in space.items()}
        first = {key: values[0] for key, values in ends.items()}
        for key, values in ends.items():
            for value in values:
                settings = [f"{name}={of}" for name, of in (first | {key: value}).items()]
                self.validate_batch_is_legal([[*fixed, *settings]])

    def _open(self, folder: Path, common: dict[str, Any]) -> "Study":
        """The folder's study; a new one, if there is none.

        Raises:
            UserError: that study's trials are not comparable with these.
        """
        import optuna
        from optuna.pruners import NopPruner
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file, self.journal = folder / "study.journal", FileLock(folder / "study.lock")
        with self.journal:
            try:
                storage = JournalStorage(JournalFileBackend(str(file), JournalLock(self.journal, file)))
                names = optuna.get_all_study_names(storage)
                study = optuna.create_study(
                    study_name=names[0] if names else folder.name,  # the folder may have been renamed
                    storage=storage,
                    sampler=self.sampler,
                    pruner=self.pruner or NopPruner(),
                    direction="maximize",
                    load_if_exists=True,
                )
                saved = study.user_attrs.get(COMMON)
                if saved is None:
                    study.set_user_attr(COMMON, common)
            except Exception as error:  # a journal may hold anything
                raise UserError(
                    f"{file} cannot be read as a study ({type(error).__name__}: {error}). Remove it, or choose "
                    "another folder with hydra.sweep.dir=…"
                ) from error
        if saved is not None and saved != common:
            raise UserError(
                f"The study in {folder} is about other settings: {_differences(saved, common)}. Give the command as it "
                "was, or another hydra.sweeper.study_name."
            )
        return study

    def _next(self, study: "Study", space: "dict[str, BaseDistribution]", folder: Path) -> "Trial | None":
        """One that a killed process left behind, else a new one, else None. A process at work on one holds its lock."""
        from optuna.trial import Trial, TrialState

        self.lock.release()
        with self.journal:
            for left in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
                if not self._claim(folder, left.number):
                    continue
                if left.distributions == space:
                    print(f"Trial {left.number + 1} was cut off: goes on", flush=True)
                    return Trial(study, left._trial_id)
                study.tell(left.number, state=TrialState.FAIL)  # killed before it had settings
                self.lock.release()
            others = len(study.get_trials(deepcopy=False))
            if others >= self.trials:
                return None
            if others and not self.began:
                study.sampler.reseed_rng()  # else this process would draw what the first one did
            self.began = True
            trial = study.ask(space)
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
            study.tell(trial, state=TrialState.PRUNED)
        elif math.isfinite(run.score):
            study.tell(trial, run.score)
        else:
            study.tell(trial, state=TrialState.FAIL)


class JournalLock:
    """Optuna's lock around an append, which ends with the process, however it does; before each the journal is mended.

    Optuna's own leave a file behind where a process is killed, and the next one waits for half a minute.
    """

    def __init__(self, lock: FileLock, journal: Path) -> None:
        self.lock, self.journal = lock, journal
        with lock:
            self._mend()

    def acquire(self) -> bool:
        self.lock.acquire()
        self._mend()
        return True

    def release(self) -> None:
        self.lock.release()

    def _mend(self) -> None:
        """Cut off a last line that a killed process has not finished: nobody has read it."""
        with contextlib.suppress(FileNotFoundError), self.journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0 or (file.seek(size - 1), file.read(1))[1] == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _differences(saved: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """What only one of the two has."""
    before, now = (
        set(of["fixed"]) | {f"{key} in {values}" for key, values in of["space"].items()} for of in (saved, common)
    )
    parts = [f"without {', '.join(sorted(now - before))}"] if now - before else []
    parts += [f"with {', '.join(sorted(before - now))}"] if before - now else []
    return " and ".join(parts)
