"""A sweep over all combinations of values."""

import contextlib
import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.schema import Range, check_settings
from cifarnet.sweeps import dry_run, jobs, multirun, parallel, space
from cifarnet.sweeps.summary import resume_command, summarize
from cifarnet.system import files


@dataclass
class Sweep(Sweeper):
    """A Hydra sweeper that runs all combinations of the values of a command and prints a table of the results.

    Args:
        max_batch_size: the largest number of jobs to launch at once; None: launch all jobs at once.
        params: values to sweep over in addition to those of the command, such as {"optimizer.lr": "0.1,0.2"}.
        zip: pair the values of all lists instead of combining them: job n has the n-th value of each list.
        dry_run: list the jobs with their settings and an estimate of their durations, without running or writing
            anything.
    """

    max_batch_size: Annotated[int, Range(1)] | None = None
    params: dict[str, str] | None = None
    zip: bool = False
    dry_run: bool = False
    config: DictConfig = field(init=False)
    hydra_context: HydraContext = field(init=False)

    def __post_init__(self) -> None:
        check_settings(vars(self), Sweep, "hydra.sweeper.")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)
        self.num_workers = parallel.num_parallel(config.hydra.launcher)
        if self.num_workers > 1 and not jobs.uses_one_device(config):
            devices = f"trainer.devices={config.trainer.devices}"
            raise UserError(f"{devices}: such jobs cannot run in parallel. Remove hydra/launcher.")
        if self.num_workers > 1:
            importlib.import_module("joblib")  # a missing package is reported before a folder is created
            self.launcher.joblib |= parallel.worker_settings(self.num_workers)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the jobs, and print the table of the results, even if the sweep fails or is interrupted.

        Raises:
            UserError: there is nothing to run, another process runs this sweep, or a job failed (the others still run).
            Interrupted: a signal stopped the sweep; the message contains the command that resumes it.
        """
        lines = [*(f"{key}={value}" for key, value in (self.params or {}).items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(lines)
        multirun.check(self.config, [override.key_or_group for override in overrides if override.is_sweep_override()])
        folder = Path(self.config.hydra.sweep.dir)
        job_overrides = [[*job, *multirun.fix_folder(folder)] for job in combinations(overrides, self.zip)]
        self._check_choices(job_overrides)
        if self.dry_run:
            dry_run.report(self.hydra_context.config_loader, self.config, job_overrides, folder, self.num_workers)
            return []
        batch_size = self.max_batch_size or len(job_overrides)
        forwarded = parallel.forwarded_signals(multirun.stop_file(folder), resume_command(folder))
        results: list[JobReturn] = []
        with files.exclusive(folder):
            if self.config.sweep.resume is None and any(folder.glob("*/.hydra")):
                other = "choose another folder with hydra.sweep.dir=…"
                raise UserError(f"{folder} contains another sweep. Resume it ({resume_command(folder)}), or {other}")
            multirun.begin(self.config, folder)
            try:
                with forwarded if self.num_workers > 1 else contextlib.nullcontext():
                    for first in range(0, len(job_overrides), batch_size):
                        results += self.launcher.launch(job_overrides[first : first + batch_size], first)
            finally:
                summarize(folder, len(job_overrides), resume_command(folder))
        jobs.raise_first_failure(results)
        return results

    def _check_choices(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Compose a config for each combination of config files, to detect a wrong name before any job runs.

        Composing the configs of all jobs would take too long: each config takes a tenth of a second.
        """
        loader = self.hydra_context.config_loader
        chooses = [bool(loader.get_group_options(cli.key_of(override))) for override in job_overrides[0]]
        distinct = {tuple(itertools.compress(overrides, chooses)): overrides for overrides in job_overrides}
        self.validate_batch_is_legal(list(distinct.values()))


def combinations(overrides: Sequence[Override], paired: bool = False) -> list[list[str]]:
    """Return the overrides of each job.

    Args:
        paired: pair the values of all lists instead of combining them.

    Raises:
        UserError: a value cannot be used, there are too many combinations, or the lengths of paired lists differ.
    """
    choices: dict[str, list[str]] = {}
    lengths: dict[str, int] = {}
    for override in overrides:
        key = override.get_key_element()
        values = space.values(override) if override.is_sweep_override() else [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]
        lengths.pop(key, None)
        if override.is_sweep_override():
            lengths[key] = len(values)
    if paired:
        if len({*lengths.values()}) > 1:
            found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            remedy = "Use lists of the same length, or remove hydra.sweeper.zip to run all combinations"
            raise UserError(f"hydra.sweeper.zip=true pairs the values of all lists, but {found}. {remedy}.")
        number = max(lengths.values(), default=1)
        return [[lines[job % len(lines)] for lines in choices.values()] for job in range(number)]
    if (number := math.prod(map(len, choices.values()))) > space.MOST:
        raise UserError(f"The sweep has {number:,} combinations. Use {space.MOST:,} or fewer, or cifarnet.search.")
    return [list(job) for job in itertools.product(*choices.values())]
