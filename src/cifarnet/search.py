"""Search: an Optuna study over the settings of a run.

python -m cifarnet.search +experiment=quickstart +search=rates
"""

import importlib.util
import sys

from cifarnet import cli, train
from cifarnet.errors import UserError

DEFAULTS = ("hydra.mode=MULTIRUN", "hydra/sweeper=search", "hydra.sweep.dir=lightning_logs/${name}/search")


def search() -> None:
    """`cifarnet.train` as a multirun whose jobs Optuna chooses (`runs.study`)."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "cifarnet.search needs Optuna: pip install 'cifarnet[search]' (in a checkout: pip install -e '.[search]')"
        )
    train.command([*DEFAULTS, *sys.argv[1:]])


def main() -> None:
    """The command `python -m cifarnet.search`."""
    cli.run(search)


if __name__ == "__main__":
    main()
