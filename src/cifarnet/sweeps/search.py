"""A search: Optuna chooses the jobs of a sweep, one after the other, and may stop them early.

The search space uses Hydra's notation for sweeps: `model.hidden=128,512`, `optimizer.lr=tag(log,interval(0.001,0.1))`.
The study is stored in a file in the search's folder, or in a database. Each process that runs the command draws a
trial, trains it, and draws the next, until there are enough. Therefore, several processes can share a search, on all
machines that can access the folder or the database, and an interrupted search continues when the command is run again.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.config import check_section, effect
from cifarnet.errors import UserError
from cifarnet.records.tables import read_sweep
from cifarnet.schema import Range, check, check_settings, has_target
from cifarnet.sweeps import jobs, multirun
from cifarnet.sweeps.space import search_space
from cifarnet.sweeps.summary import resume_command, summarize
from cifarnet.system import hardware

if TYPE_CHECKING:  # optuna takes half a second to import
    from optuna import Study

    from cifarnet.sweeps.storage import Database, Journal
    from cifarnet.sweeps.trials import Trials

SETTINGS = "settings"  # an attribute of the study: the settings that all trials share, and the search space


@dataclass
class Search(Sweeper):
    """A Hydra sweeper whose jobs are the trials of an Optuna study (Akiba et al., 2019,
    https://arxiv.org/abs/1907.10902).

    Trial n is job n. Its score is the best validation accuracy. The pruner receives the accuracy after every epoch.

    Args:
        trials: the number of trials in the study, including those of other processes and earlier commands.
        study_name: the study's name in a database.
        params: the search space in addition to the command's: {"optimizer.lr": "tag(log, interval(0.001, 0.1))"}.
        sampler: an Optuna sampler, which chooses the settings of the next trial; None: Optuna's default.
        pruner: an Optuna pruner, which stops unpromising trials; None: no trial is stopped early.
        storage: the URL of a database, such as postgresql://host/database; None: a file in the search's folder.
        heartbeat: seconds between the heartbeats of a trial in a database. A trial without a heartbeat for twice as
            long is dead.
    """

    trials: Annotated[int, Range(1)]
    study_name: str = "search"
    params: dict[str, str] = field(default_factory=dict)
    sampler: Any = None
    pruner: Any = None
    storage: str | None = None
    heartbeat: Annotated[int, Range(1)] = 60
    config: DictConfig = field(init=False)
    hydra_context: HydraContext = field(init=False)

    def __post_init__(self) -> None:
        from optuna import pruners, samplers

        check_settings(vars(self), Search, "hydra.sweeper.")
        check("hydra.sweeper.sampler", self.sampler, samplers.BaseSampler | None)
        check("hydra.sweeper.pruner", self.pruner, pruners.BasePruner | None)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        launcher = config.hydra.launcher["_target_"].rpartition(".")[2]
        if launcher not in ("BasicLauncher", "Slurm"):
            problem = "A search runs one trial at a time in each process. To run several, remove hydra/launcher, and"
            raise UserError(f"{problem} start it in several terminals, each with a share of the cores: threads=…")
        self.uses_slurm = launcher == "Slurm"
        for name in ("sampler", "pruner"):
            if has_target(part := config.hydra.sweeper.get(name)):
                check_section(f"hydra.sweeper.{name}", part)
        self.config, self.hydra_context = config, hydra_context
        self.task: Callable[..., Any] = task_function

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are enough, and print the table of all trials, even if the search fails.

        Raises:
            UserError: the study cannot be used, or a trial failed (the others still run).
            Interrupted: a signal stopped the search; the message contains the command that resumes it.
        """
        from cifarnet.sweeps import search_figures  # imports matplotlib
        from cifarnet.sweeps.trials import Trials

        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        fixed, space = search_space(lines, self.hydra_context.config_loader)
        multirun.check(self.config, space)
        self._check_choices(fixed, space)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        storage = self._open_storage(folder)
        with storage.errors():
            study = self._open_study(storage, fixed, space)
            trials = Trials(study, storage, space, folder, self.trials)
            trials.check_folder()
            multirun.begin(self.config, folder)
            failures: list[JobReturn] = []
            try:
                if self.uses_slurm:
                    self._run_in_slurm(trials, arguments)
                else:
                    self._run(trials, fixed, failures)
            finally:
                trials.release()
                runs = trials.runs(fixed)
                summarize(folder, self.trials, resume_command(folder), runs)
                search_figures.draw(study, runs, list(space), folder)
        jobs.raise_first_failure(failures)

    def _run(self, trials: "Trials", fixed: Sequence[str], failures: list[JobReturn]) -> None:
        """Run trials one after the other in this process."""
        if self.config.trainer.accelerator != "cpu" and jobs.uses_one_device(self.config):
            hardware.claim_gpu()
        resume = f"sweep.resume={cli.literal(str(trials.folder))}"  # an interrupted trial continues
        place = [resume, *multirun.fix_folder(trials.folder)]
        while not multirun.stop_file(trials.folder).exists() and (trial := trials.next()) is not None:
            settings = [f"{key}={value}" for key, value in trial.params.items()]
            with trials.storage.heartbeat(trial):
                launcher = self._launcher(partial(self.task, trial=trial))
                [result] = launcher.launch([[*fixed, *settings, *place]], initial_job_idx=trial.number)
            outcome = jobs.outcome(result)
            trials.tell(trial, outcome)
            print(f"Trial {trial.number + 1} of {self.trials}: {outcome}  {' '.join(settings)}", flush=True)
            if result.status == JobStatus.FAILED:
                failures.append(result)

    def _run_in_slurm(self, trials: "Trials", arguments: list[str]) -> None:
        """Submit processes to SLURM that draw and run the trials."""
        if (missing := trials.num_missing()) > 0:
            self._launcher(self.task).launch_search(arguments, missing)
        if (missing := trials.num_missing()) > 0:
            ended = "because their processes ended. Run the command again."
            raise UserError(f"{missing} of {self.trials} trials are missing {ended}")
        for run in read_sweep(trials.folder):
            if run.status == "failed":
                raise UserError(f"Trial {run.folder.name} failed: {run.note}")

    def _launcher(self, task: TaskFunction) -> Any:
        return Plugins.instance().instantiate_launcher(self.hydra_context, task, self.config)

    def _check_choices(self, fixed: Sequence[str], space: Mapping[str, Any]) -> None:
        """Compose a config for each choice, and one for each range, to detect a wrong name before any trial runs."""
        values = {key: getattr(found, "choices", None) or (found.low,) for key, found in space.items()}
        first = {key: choices[0] for key, choices in values.items()}
        for key, choices in values.items():
            for choice in choices:
                settings = [f"{name}={value}" for name, value in (first | {key: choice}).items()]
                self.validate_batch_is_legal([[*fixed, *settings]])

    def _open_storage(self, folder: Path) -> "Journal | Database":
        from cifarnet.sweeps import storage

        if self.storage is None:
            return storage.Journal(folder)
        sweeper: Any = OmegaConf.to_container(self.config.hydra.sweeper)  # with ${oc.env:…} unresolved
        storage.refuse_password(sweeper["storage"])
        return storage.connect(self.storage, folder, f"{self.config.name}/{self.study_name}", self.heartbeat)

    def _open_study(self, storage: "Journal | Database", fixed: Sequence[str], space: Mapping[str, Any]) -> "Study":
        """Load the study from the storage, or create it.

        Raises:
            UserError: the study was created with other settings, so its trials would not be comparable.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", ".*is already reported.*")  # by an interrupted process
        warnings.filterwarnings("ignore", ".*[Hh]eartbeat.*")  # Optuna intends heartbeats for Study.optimize
        keys = [cli.key_of(line) for line in fixed]
        decides = [key == "start.checkpoint" or effect(key) not in ("nothing", "speed") for key in keys]
        deciding = list(itertools.compress(fixed, decides))
        settings = [*deciding, *(f"{key} in {distribution}" for key, distribution in space.items())]
        options = {"study_name": storage.study_name, "storage": storage, "sampler": self.sampler}
        options["pruner"] = self.pruner or optuna.pruners.NopPruner()
        with storage.lock:
            try:
                study = optuna.create_study(**options, direction="maximize")
            except optuna.exceptions.DuplicatedStudyError:
                study = optuna.load_study(**options)
                study.sampler.reseed_rng()  # only the process that creates the study uses the sampler's seed
            if SETTINGS not in study.user_attrs:
                study.set_user_attr(SETTINGS, settings)
        if differing := sorted(set(settings) ^ set(study.user_attrs[SETTINGS])):
            problem = f"The study {study.study_name} was created with other settings: {', '.join(differing)}"
            raise UserError(f"{problem}. Use the same settings, or choose another hydra.sweeper.study_name.")
        return study
