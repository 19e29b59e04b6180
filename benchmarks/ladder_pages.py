"""Write the results of the ladder and of three other benchmarks into README.md, docs/zoo.md, benchmarks/README.md, the
experiments' files and a figure."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

import common
from cifarnet.records.figures import save
from cifarnet.system import files

BEGIN, END = "<!-- written by benchmarks/ladder.py -->", "<!-- to here -->"
COLUMNS = (
    *("`python -m cifarnet.train …`", "parameters", "GFLOP per image", "epochs", "test accuracy", "seconds"),
    *("images/s", "images", "hardware", "commit, date"),
)
UNTIMED = "not timed"  # because other programs ran at the same time

Result = Mapping[str, Any]  # an entry of results/ladder.json


class Row(NamedTuple):
    """The runs of one command on one machine and data set, which differ only in their seeds."""

    machine: str
    images: str
    sha256: str
    command: str
    runs: list[Result]

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self.command.split()[0].removeprefix("+experiment=")

    def mean(self, key: str) -> float | None:
        """Return the mean over the runs that have this value; None if there are none."""
        values = [run[key] for run in self.runs if run[key] is not None]
        return statistics.mean(values) if values else None

    def shown(self, key: str) -> str:
        mean = self.mean(key)
        return UNTIMED if mean is None else f"{mean:,.0f}"

    def accuracy(self) -> str:
        """Return the mean ± standard deviation (number of runs), in percent."""
        tested, one_view = (
            common.mean_and_deviation([run[key] for run in self.runs])
            for key in ("test_accuracy", "test_accuracy_one_view")
        )
        tta = self.runs[0]["tta"]
        return f"{tested}% ({len(self.runs)}{f'; {one_view} without {tta}' if tta != 'none' else ''})"


def write(root: Path, results: Iterable[Result]) -> None:
    """Write the tables, the figure and the experiments' results below the root of the project."""
    rows = rows_of(results)
    chosen = shown(rows)
    replace(root / "docs/zoo.md", zoo_table(rows))
    replace(root / "README.md", [*readme_table(root, chosen), *speedrun_table(), *throughput_table()])
    replace(root / "benchmarks/README.md", ablation_table())
    for name, row in chosen.items():
        write_header(experiment(root, name), row)
    save(figure(rows), root / "docs/images/ladder.png")


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Group results by command, hardware and data set, sorted by seconds."""
    groups = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        machine = "{hardware}, {threads} threads, {precision}, torch {torch}".format_map(result)
        groups[machine, result["images"], result.get("sha256"), result["command"]].append(result)
    rows = [Row(*key, runs) for key, runs in groups.items()]
    return sorted(rows, key=lambda row: (row.machine, row.images, row.mean("seconds") or float("inf")))


def shown(rows: Iterable[Row]) -> dict[str, Row]:
    """Return, for each experiment, its row with the most seeds; rows that change a setting are left out."""
    plain = [row for row in rows if all(item.startswith(("+experiment=", "data=")) for item in row.command.split())]
    return {row.name: row for row in sorted(plain, key=lambda row: len(row.runs))}


def replace(page: Path, lines: Sequence[str]) -> None:
    """Replace the part of a page between the two marks."""
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    files.write(page, "\n".join([before + BEGIN, "", *lines, "", END + after]))


def zoo_table(rows: Sequence[Row]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * 6 + " --- | --- | --- |"]
    for row in rows:
        first = row.runs[0]
        commits = dict.fromkeys(f"{commit(run)}, {run['date']}" for run in row.runs)
        cells = [f"`{row.command}`", f"{first['parameters']:,}", f"{first['gflop']:.3g}", str(first["epochs"])]
        cells += [row.accuracy(), row.shown("seconds"), row.shown("images_per_second")]
        lines.append(f"| {' | '.join([*cells, row.images, row.machine, '; '.join(commits)])} |")
    return lines


def commit(run: Result) -> str:
    name, dirty, _ = (run["git_commit"] or "unknown").partition("-dirty")
    return name[:7] + dirty


def readme_table(root: Path, rows: Mapping[str, Row]) -> list[str]:
    lines = ["| `+experiment=` | test accuracy (seeds) | seconds | hardware |", "| --- | ---: | ---: | --- |"]
    for name, row in sorted(rows.items(), key=lambda item: item[1].mean("test_accuracy") or 0):
        cells = [f"`{name}`: {description(experiment(root, name))}", row.accuracy(), row.shown("seconds")]
        lines.append(f"| {' | '.join(cells)} | {row.runs[0]['hardware']}, {row.runs[0]['threads']} threads |")
    return lines


def speedrun_table() -> list[str]:
    """Return the last result of benchmarks/speedrun.py; its first variant is the one that the ratios refer to."""
    if not (result := read_result("speedrun")):
        return []
    facts, base = result["facts"], next(iter(result["medians"].values()))
    lines = ["", f"`benchmarks/speedrun.py`, measured alternately, with {machine_of(result)}:", ""]
    target = f"mean above {100 * facts['target']:g}%"
    lines += [f"| | test accuracy (seeds) | p, {target} | seconds, median | of these, test | ratio |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, seconds in result["medians"].items():
        accuracies = facts["accuracies"][name]
        cells = [f"`{name}`", f"{common.mean_and_deviation(accuracies)}% ({len(accuracies)})"]
        cells += [f"{common.p_above(accuracies, facts['target']):.2g}", f"{seconds:,.0f}"]
        cells += [f"{statistics.median(facts['test_seconds'][name]):,.0f}", f"{seconds / base:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ablation_table() -> list[str]:
    """Return the last result of benchmarks/ablation.py, with means over its runs."""
    if not (result := read_result("ablation")):
        return ["Not measured yet."]
    lines = [f"{machine_of(result)}:", "", "| | validation accuracy (seeds) | seconds of training | gain from TTA |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, runs in result["facts"]["runs"].items():
        tested = common.mean_and_deviation([run["accuracy"] / 100 for run in runs])
        gain = statistics.mean(run["tta"] for run in runs)
        lines.append(f"| {name} | {tested}% ({len(runs)}) | {result['medians'][name]:,.0f} | {gain:.2f} |")
    return lines


def throughput_table() -> list[str]:
    """Return the last results of benchmarks/throughput.py: the files results/throughput*.json, one line each."""
    lines = [
        "",
        "`benchmarks/throughput.py`: images/s while training the baseline with batches of 64, and the ratios of",
    ]
    lines += ["cifarnet to plain PyTorch and to Keras, which use float32:", ""]
    lines += ["| | cifarnet uses | plain PyTorch | Keras on TensorFlow | cifarnet | ratios |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for file in sorted(common.RESULTS.glob("throughput*.json")):
        result = read_result(file.stem)
        sides = [result["medians"][side] for side in ("plain PyTorch", "keras", "cifarnet")]
        cells = [machine_of(result), result["facts"]["precision of cifarnet"], *(f"{side:,.0f}" for side in sides)]
        lines.append(f"| {' | '.join(cells)} | {sides[2] / sides[0]:.2f}, {sides[2] / sides[1]:.2f} |")
    return lines


def read_result(name: str) -> dict[str, Any]:
    """Return a benchmark's last result; an empty dictionary if it was not measured yet."""
    file = common.RESULTS / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def machine_of(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['name']}, {machine['threads']} threads, torch {result['versions']['torch']}, {result['date']}"


def experiment(root: Path, name: str) -> Path:
    return root / "configs/experiment" / f"{name}.yaml"


def description(file: Path) -> str:
    """Return the first sentence of an experiment's description, which follows its command."""
    comments = file.read_text("utf-8").partition("\ndefaults")[0].splitlines()[2:]
    return " ".join(line.removeprefix("# ") for line in comments).partition(". ")[0].rstrip(".")


def write_header(file: Path, row: Row) -> None:
    """Write the result of an experiment into its file, in place of the line that begins with "# Result:"."""
    seconds = row.mean("seconds")
    timed = f", {seconds:,.0f} s per run" if seconds else ""
    line = f"# Result: {row.accuracy()} on {row.machine}{timed} (docs/zoo.md)\n"
    files.write(file, re.sub(r"# Result: .*\n", lambda _: line, file.read_text("utf-8")))


def figure(rows: Sequence[Row]) -> Figure:
    """Draw test accuracy against seconds of training, with one color per hardware and data set."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    handles = []
    for group in dict.fromkeys(row[:2] for row in rows):
        points = []
        for row in rows:
            if row[:2] == group and (seconds := row.mean("seconds")):
                values = [100 * run["test_accuracy"] for run in row.runs]
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                points.append((seconds, statistics.mean(values), deviation))
                axis.annotate(row.name, points[-1][:2], xytext=(6, -12), textcoords="offset points")
        if points:
            color = axis.errorbar(*zip(*points, strict=True), fmt="o", capsize=3).lines[0].get_color()
            label = f"{group[1]}, {group[0]}"
            handles.append(Line2D([], [], color=color, linestyle="none", label=label))  # no marker: it is no result
    axis.set(xlabel="seconds of training", ylabel="test accuracy, %", xscale="log", title="Accuracy against seconds")
    axis.margins(x=0.2, y=0.15)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if handles:
        style = {"labelcolor": "linecolor", "handlelength": 0, "handletextpad": 0}
        axis.legend(handles=handles, frameon=False, loc="lower right", fontsize="small", **style)
    return figure
