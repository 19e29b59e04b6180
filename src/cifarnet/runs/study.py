"""A search's study: Optuna chooses the jobs of a multirun, one after the other, and may stop them early.

What is searched is written as Hydra's sweeps are: `model.hidden=128,512`, `optimizer.lr=tag(log,interval(0.001,0.1))`.
The study is a file in the multirun's folder. Each process that runs the command takes a trial, trains it, and takes the
next, until there are enough: so several processes share a search, on any machines that see the folder, and one that was
killed goes on when it is started again.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.runs.summary import summarize
from cifarnet.runs.tables import Run, read_run

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
        params: what is searched, beside the command's own sweeps: {"optimizer.lr": "tag(log, interval(0.001, 0.1))"}.
        sampler: chooses the settings of the next trial; None: Optuna's default.
        pruner: stops a trial that is not worth going on with; None: all run to their end.
    """

    def __init__(
        self,
        trials: int,
        params: Mapping[str, str] | None = None,
        sampler: "BaseSampler | None" = None,
        pruner: "BasePruner | None" = None,
    ) -> None:
        self.trials = trials
        self.params = dict(params or {})
        self.sampler, self.pruner = sampler, pruner

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if not config.hydra.launcher["_target_"].endswith(".BasicLauncher"):
            raise UserError(
                "A search runs one trial at a time. For several, start the same command in several terminals "
                "(with threads=… for each its share of the cores), without hydra/launcher."
            )
        self.config, self.context, self.task = config, hydra_context, task_function
        self.lock = FileLock("")  # of the trial that this process runs

    def sweep(self, arguments: list[str]) -> None:
        fixed, space = self._space(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        own = [override for override in fixed if not override.startswith("sweep.")]
        common = {"fixed": own, "space": {key: str(of) for key, of in space.items()}}
        study = self._open(folder, common)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        failures = []
        try:
            while (trial := self._next(study, space, folder)) is not None:
                settings = [f"{key}={value}" for key, value in trial.params.items()]
                # with sweep.resume a trial that was cut off goes on
                result = self._launch(trial, [*fixed, *settings, f"sweep.resume={cli.literal(str(folder))}"])
                run = read_run(folder / str(trial.number))
                self._tell(study, trial, run)
                if result.status == JobStatus.FAILED:
                    failures.append(result)
                outcome = f"{run.score:.2%}" if run.status == "done" else run.status
                print(f"Trial {trial.number + 1} of {self.trials}: {outcome}  {' '.join(settings)}", flush=True)
        finally:
            self.lock.release()
            summarize(folder)
        for failure in failures:
            failure.return_value  # noqa: B018 - raises what the job raised

    def _launch(self, trial: "Trial", overrides: list[str]) -> JobReturn:
        """Train it, in this process, which tells the trial how it goes."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=partial(self.task, trial=trial), config=self.config
        )
        [result] = launcher.launch([overrides], initial_job_idx=trial.number)
        return result

    def _space(self, arguments: Sequence[str]) -> tuple[list[str], "dict[str, BaseDistribution]"]:
        """The overrides that all trials share, and what each takes its values from."""
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(lines)
        overrides = {override.get_key_element(): override for override in parsed}  # the last one counts
        fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
        space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        if not space:
            raise UserError(
                "Nothing to search. Name it with +search=rates, or with values such as model.hidden=128,512 or "
                "'optimizer.lr=tag(log,interval(0.001,0.1))'."
            )
        return fixed, space

    def _open(self, folder: Path, common: dict[str, Any]) -> "Study":
        """The folder's study; a new one, if there is none.

        Raises:
            UserError: that study's trials are not comparable with these.
        """
        import optuna
        from optuna.pruners import NopPruner
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = str(folder / "study.journal")
        with FileLock(folder / "study.lock"):
            study = optuna.create_study(
                study_name=folder.name,
                storage=JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file))),
                sampler=self.sampler,
                pruner=self.pruner or NopPruner(),
                direction="maximize",
                load_if_exists=True,
            )
            saved = study.user_attrs.get(COMMON)
            if saved is None:
                study.set_user_attr(COMMON, common)
        if saved is not None and saved != common:
            raise UserError(
                f"The study in {folder} is about other settings: {_differences(saved, common)}. Give the command as it "
                "was, or another folder with hydra.sweep.dir=…"
            )
        if study.trials:
            study.sampler.reseed_rng()  # else this process would suggest what the first one did
        return study

    def _next(self, study: "Study", space: "dict[str, BaseDistribution]", folder: Path) -> "Trial | None":
        """One that a killed process left behind, else a new one, else None. A process at work on one holds its lock."""
        from optuna.trial import Trial, TrialState

        self.lock.release()
        with FileLock(folder / "study.lock"):
            for left in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
                if not self._claim(folder, left.number):
                    continue
                if left.params.keys() == space.keys():
                    print(f"Trial {left.number + 1} was cut off: goes on", flush=True)
                    return Trial(study, left._trial_id)
                study.tell(left.number, state=TrialState.FAIL)  # killed before it had settings
                self.lock.release()
            if len(study.get_trials(deepcopy=False)) >= self.trials:
                return None
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


def distribution(override: Override) -> "BaseDistribution":
    """Optuna's distribution for one of Hydra's sweeps: a choice, a range, or an interval with both ends included."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep_of = override.value()
    if isinstance(sweep_of, IntervalSweep):
        low, high, log = sweep_of.start, sweep_of.end, "log" in sweep_of.tags
        whole = isinstance(low, int) and isinstance(high, int)
        return IntDistribution(low, high, log=log) if whole else FloatDistribution(low, high, log=log)
    if isinstance(sweep_of, RangeSweep):
        values = [float(value) if "." in value else int(value) for value in _values(override)]
        kind = FloatDistribution if isinstance(values[0], float) else IntDistribution
        return kind(min(values), max(values), step=abs(sweep_of.step))
    return CategoricalDistribution(_values(override))


def _values(override: Override) -> list[str]:
    return list(override.sweep_string_iterator())


def _differences(saved: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """What only one of the two has."""
    before, now = (
        set(of["fixed"]) | {f"{key} in {values}" for key, values in of["space"].items()} for of in (saved, common)
    )
    parts = [f"without {', '.join(sorted(now - before))}"] if now - before else []
    parts += [f"with {', '.join(sorted(before - now))}"] if before - now else []
    return " and ".join(parts)
