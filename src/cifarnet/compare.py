"""Compare groups of runs, and test whether their differences are statistically significant.

Runs that differ only in the seed or the fold form a group. The means of the groups are compared with Welch's t-test;
groups of folds, with a paired t-test. All results come from the runs' `metrics.json`.

examples:
  python -m cifarnet.compare lightning_logs/quickstart
  python -m cifarnet.compare lightning_logs/mine --against lightning_logs/baseline metric=val_accuracy
"""

from pathlib import Path
from typing import Literal

from cifarnet import cli
from cifarnet.errors import UserError, printable
from cifarnet.records.record import NUMBERS
from cifarnet.schema import check
from cifarnet.system import files


def _compare() -> None:
    arguments = cli.parse("compare", __doc__, against=True)
    config = cli.compose("compare", arguments.settings)
    cli.check_keys("compare", config)
    check("metric", config.metric, Literal[NUMBERS] | None)  # pyright: ignore[reportOperatorIssue]
    check("output", config.output, str | None)
    # imported here, because scipy and matplotlib take a second to import
    from cifarnet.records import comparison, figures

    groups, left_out = comparison.load(arguments.paths, arguments.against, config.metric)
    print(printable(f"\n{comparison.table(groups)}\n"))
    lines = comparison.conclusions(groups)
    lines += [f"warning: {warning}" for warning in left_out + comparison.warnings(groups)]
    print(printable("\n".join(f"  {line}" for line in lines)))
    output = files.unused(Path("comparison.png")) if config.output is None else Path(config.output)
    try:
        figures.save(figures.comparison(groups), output)
    except (OSError, ValueError) as error:
        raise UserError(f"output={output} cannot be written: {error}") from error
    print(f"  {output}\n")


def main() -> None:
    """Run `python -m cifarnet.compare`."""
    cli.run(_compare)


if __name__ == "__main__":
    main()
