"""Hydra takes sweepers and launchers from this package alone."""

import contextlib
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from cifarnet.sweeps import grid, search


class Sweep(BasicSweeper):
    """Hydra's own sweeper: all combinations, and a table at the end, however it comes."""

    def sweep(self, arguments: list[str]) -> Any:
        return grid.run(self, arguments)


class Search(search.Search):
    __doc__ = search.Search.__doc__


with contextlib.suppress(ModuleNotFoundError):  # the extra [slurm]
    from cifarnet.sweeps import slurm

    class Slurm(slurm.Slurm):
        __doc__ = slurm.Slurm.__doc__

        def follow(self, job: dict[str, Any]) -> None:
            from cifarnet import train

            train.follow(job)
