"""Hydra takes sweepers from this package alone."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from cifarnet.runs import combinations, study


class Sweep(BasicSweeper):
    """Hydra's own sweeper: all combinations, and a table at the end, however it comes."""

    def sweep(self, arguments: list[str]) -> Any:
        return combinations.run(self, arguments)


class Search(study.Search):
    __doc__ = study.Search.__doc__
