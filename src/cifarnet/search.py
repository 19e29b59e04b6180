"""Search for good settings with Optuna, one trial at a time.

python -m cifarnet.search +experiment=quickstart +search=rates
"""

import hashlib
import sys
from collections.abc import Sequence

from cifarnet import cli, train
from cifarnet.errors import UserError

DEFAULTS = (
    "hydra.mode=MULTIRUN",
    "hydra/sweeper=search",
    "hydra.sweep.dir=lightning_logs/${name}/${hydra.sweeper.study_name}",
    "hydra/help=search",
)


def command() -> None:
    """Run `cifarnet.train` as a sweep in which Optuna chooses the jobs (`sweeps.search`)."""
    arguments = sys.argv[1:]
    for key in ("hydra.sweeper.zip", "hydra.sweeper.dry_run"):
        if cli.value_of(key, arguments) is not None:
            raise UserError(f"{key} applies to a sweep (python -m cifarnet.train -m …). Remove it.")
    train.command([*DEFAULTS, f"hydra.sweeper.study_name={study_name(arguments)}", *arguments])


def study_name(arguments: Sequence[str]) -> str:
    """Return a name that depends on the settings, but not on their order, so that a search continues in its folder."""
    settings = sorted(argument for argument in arguments if not argument.startswith(("hydra.", "hydra/", "-")))
    return f"search_{hashlib.sha256(' '.join(settings).encode()).hexdigest()[:8]}"


def main() -> None:
    """Run `python -m cifarnet.search`."""
    train.main(command)


if __name__ == "__main__":
    main()
