"""Search: an Optuna study over the settings of a run.

python -m cifarnet.search +experiment=quickstart +search=rates
"""

import hashlib
import importlib.util
import sys
from collections.abc import Sequence

from cifarnet import cli, train
from cifarnet.errors import UserError
from cifarnet.system import distributed

DEFAULTS = (
    "hydra.mode=MULTIRUN",
    "hydra/sweeper=search",
    "hydra.sweep.dir=lightning_logs/${name}/${hydra.sweeper.study_name}",
    "hydra/help=search",
)


def search() -> None:
    """`cifarnet.train` as a multirun whose jobs Optuna chooses (`sweeps.search`)."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "cifarnet.search needs Optuna: pip install 'cifarnet[search]' (in a checkout: pip install -e '.[search]')"
        )
    arguments = sys.argv[1:]
    train.command([*DEFAULTS, f"hydra.sweeper.study_name={study_name(arguments)}", *arguments])


def study_name(arguments: Sequence[str]) -> str:
    """The same for the same search, however it is asked for: so it goes on where it was, and others lie elsewhere."""
    of = sorted(argument for argument in arguments if not argument.startswith(("hydra.", "hydra/", "-")))
    return f"search_{hashlib.sha256(' '.join(of).encode()).hexdigest()[:8]}"


def main() -> None:
    """The command `python -m cifarnet.search`."""
    if distributed.placement().world_size > 1:
        cli.run(lambda: distributed.run_ranks(search, train.train_run))
    else:
        cli.run(search)


if __name__ == "__main__":
    main()
