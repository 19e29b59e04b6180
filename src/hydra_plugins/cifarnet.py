"""The classes that Hydra loads as plugins, which it takes from this package only."""

import contextlib

from cifarnet.sweeps import grid, search


class Sweep(grid.Sweep):
    __doc__ = grid.Sweep.__doc__


class Search(search.Search):
    __doc__ = search.Search.__doc__


with contextlib.suppress(ModuleNotFoundError):  # the extra [slurm]
    from cifarnet.sweeps import slurm

    class Slurm(slurm.Slurm):
        __doc__ = slurm.Slurm.__doc__
