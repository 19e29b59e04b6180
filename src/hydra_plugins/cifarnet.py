"""Hydra takes sweepers from this package alone."""

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from cifarnet.runs import study
from cifarnet.runs.summary import summarize


class Sweep(BasicSweeper):
    """Hydra's own sweeper: all combinations. At the end, however it comes, the sweep is summed up."""

    def sweep(self, arguments: list[str]) -> Any:
        try:
            return super().sweep(arguments)
        finally:
            summarize(Path(self.config.hydra.sweep.dir))


class Search(study.Search):
    __doc__ = study.Search.__doc__
