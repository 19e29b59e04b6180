"""Compare groups of runs, and test whether their differences are statistically significant.

Runs that differ only by seed form a group. The means of the groups are compared by Welch's t-test. All results come
from the runs' `metrics.json`.

examples:
  python -m cifarnet.compare lightning_logs/quickstart
  python -m cifarnet.compare lightning_logs/mine --against lightning_logs/baseline metric=val_accuracy
"""

from pathlib import Path

from cifarnet import cli
from cifarnet.errors import UserError, printable
from cifarnet.schema import check


def _compare() -> None:
    arguments = cli.parse("compare", __doc__, against=True)
    config = cli.compose("compare", arguments.settings)
    check("metric", config.metric, str | None)
    check("output", config.output, str)
    # imported late, because scipy and matplotlib take a second
    from cifarnet.records import comparison, figures

    groups, left_out, name = comparison.load(arguments.paths, arguments.against, config.metric)
    metric, output = comparison.Metric(name, groups), Path(config.output)
    print(printable(f"\n{comparison.table(groups, metric)}\n"))
    lines = comparison.conclusions(groups, metric)
    lines += [f"warning: {warning}" for warning in left_out + comparison.warnings(groups, name)]
    print(printable("\n".join(f"  {line}" for line in lines)))
    try:
        figures.save(figures.comparison(groups, name, comparison.differences(groups)), output)
    except (OSError, ValueError) as error:
        raise UserError(f"output={output} cannot be written: {error}") from error
    print(f"  {output}\n")


def main() -> None:
    """The command `python -m cifarnet.compare`."""
    cli.run(_compare)


if __name__ == "__main__":
    main()
