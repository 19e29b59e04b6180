"""A sweep over all combinations of the values given."""

import contextlib
import functools
import math
import signal
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn

from cifarnet.errors import Interrupted, UserError
from cifarnet.sweeps import jobs, parallel, space
from cifarnet.sweeps.summary import resume_command, summarize
from cifarnet.system import files


def run(sweeper: BasicSweeper, arguments: list[str]) -> list[JobReturn]:
    """What Hydra's sweeper does; one process at a time, a signal lets parallel jobs save, and in the end a table.

    Raises:
        UserError: there is nothing to run, or another process runs it.
        Exception: what the first job that failed raised, after the others.
    """
    assert sweeper.hydra_context is not None
    jobs.check_sweep(sweeper.config)
    lines = [*(f"{key}={value}" for key, value in (sweeper.params or {}).items()), *arguments]
    parsed = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader).parse_overrides(lines)
    check_number(parsed)
    batches = sweeper.split_arguments(parsed, sweeper.max_batch_size)
    sweeper.validate_batch_is_legal(differing(sweeper, [job for batch in batches for job in batch]))
    folder = Path(sweeper.config.hydra.sweep.dir)
    with files.exclusive(folder):
        jobs.begin(sweeper.config, folder)
        try:
            results = launch(sweeper, batches, folder)
        finally:
            summarize(folder, sum(map(len, batches)), resume_command(folder))
    for result in results:
        jobs.raise_failure(result)
    return results


def check_number(parsed: Sequence[Override]) -> None:
    """Refuse a sweep without jobs, or with more than anyone means."""
    jobs = math.prod(len(space.values(override)) for override in parsed if override.is_sweep_override())
    if jobs > space.MOST:
        raise UserError(f"These are {jobs:,} combinations. Give {space.MOST:,} or less, or use cifarnet.search.")


def differing(sweeper: BasicSweeper, jobs: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Those of which the configs must be composed to know that all can be: one of each combination of groups' choices.

    Composing takes a tenth of a second, and other values cannot make it fail.
    """
    loader = sweeper.hydra_context.config_loader
    groups = functools.cache(lambda key: bool(loader.get_group_options(key)))
    found: dict[tuple[str, ...], Sequence[str]] = {}
    for job in jobs:
        parted = [override.partition("=") for override in job]
        found.setdefault(tuple(f"{key}={value if groups(key.lstrip('+~')) else ''}" for key, _, value in parted), job)
    return list(found.values())


def launch(sweeper: BasicSweeper, batches: Sequence[Sequence[Sequence[str]]], folder: Path) -> list[JobReturn]:
    """Run the jobs."""
    beside = parallel.jobs_at_a_time(sweeper.config.hydra.launcher) > 1
    results: list[JobReturn] = []
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(parallel.passing_signals(jobs.stop_file(folder))) if beside else []
        if beside:
            stack.enter_context(parallel.joblib_of_ones_own())
        try:
            for batch in batches:
                results += sweeper.launcher.launch(batch, initial_job_idx=len(results))
        except BaseException:
            if not received:
                raise
    if received:
        what = f"Stopped by {signal.Signals(received[0]).name}."
        raise Interrupted(what, 128 + received[0], resume_command(folder))
    return results
