"""Which of several settings is better, and is the difference more than luck?

Runs that differ only by seed are one group; the groups' means are compared by Welch's t-test. All figures come from the
runs' `metrics.json`.
"""

from pathlib import Path

from cifarnet import cli
from cifarnet.runs.comparison import compare
from cifarnet.settings import check_type

EXAMPLES = """\
  python -m cifarnet.compare lightning_logs/quickstart
  python -m cifarnet.compare lightning_logs/mine --against lightning_logs/baseline metric=val_accuracy
"""


def _compare() -> None:
    arguments = cli.parse("compare", __doc__, EXAMPLES, against=True)
    config = cli.compose("compare", arguments.settings)
    for name in ("metric", "output"):
        check_type(name, config[name], str)
    compare(arguments.paths, arguments.against, config.metric, Path(config.output))


def main() -> None:
    """The command `python -m cifarnet.compare`."""
    cli.run(_compare)


if __name__ == "__main__":
    main()
