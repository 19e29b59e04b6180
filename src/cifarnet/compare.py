"""Which of several recipes is better, and is the difference more than luck?

python -m cifarnet.compare lightning_logs/quickstart
python -m cifarnet.compare lightning_logs/mine --against lightning_logs/baseline --metric val_accuracy

Runs that differ only by seed are one group; the groups' means are compared by Welch's t-test. All figures come from the
runs' `metrics.json`.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.significance import LEVEL, MOST_SEEDS, POWER, Welch, holm, interval, seeds_needed, welch
from cifarnet.train import SPEED, WHERE

# by what it holds, a run's file is told from others of its name
RECORD = {"config", "seed", "data", "tested_epoch", "test_accuracy", "finished", "history"}

# settings on which no figure depends
REPLICA = {"name", "seed", "output_dir", "ckpt_path", "total_steps", "sweep", "logger"}
WATCHING = {f"cifarnet.callbacks.{name}" for name in ("History", "Pictures", "ProgressBar", "StopOnSignal")}
PRINTING = {"enable_progress_bar", "enable_model_summary", "log_every_n_steps", "num_sanity_val_steps", "profiler"}
# settings on which times depend, and accuracies but by rounding
HARDWARE = {"threads", "keep_freed_memory", "trainer.accelerator", "trainer.devices", "trainer.deterministic"}
# settings that follow another one in configs/, unless they are given a value of their own
FOLLOWS = {
    "data.shuffle_seed": "seed",
    "module.seed": "seed",
    "module.channels_last": "channels_last",
    "optimizer.bias.lr": "optimizer.lr",
    "optimizer.matrix.lr": "optimizer.lr",
    "scheduler.max_lr": "optimizer.lr",
    "scheduler.total_steps": "total_steps",
    "scheduler.total_iters": "total_steps",
    "scheduler.T_max": "total_steps",
    "trainer.check_val_every_n_epoch": "trainer.max_epochs",
}


@dataclass
class Run:
    """A finished run: its `metrics.json`, and the settings that decide its figures, as text."""

    path: Path
    metrics: dict[str, Any]
    settings: dict[str, str]


@dataclass
class Group:
    """Runs that differ only by seed, with the metric's value in each. `repeats` are left out: a seed counts once."""

    runs: list[Run]
    values: list[float]
    repeats: list[Run] = field(default_factory=list)
    baseline: bool = False
    label: str = ""

    @property
    def settings(self) -> dict[str, str]:
        return self.runs[0].settings

    @property
    def name(self) -> str:
        names = " / ".join(dict.fromkeys(str(run.metrics.get("name")) for run in self.runs))
        return f"{names} (baseline)" if self.baseline else names

    @property
    def folder(self) -> str:
        """The folder that all its runs lie in."""
        return os.path.relpath(os.path.commonpath([run.path.parent for run in self.runs]))

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation; NaN for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass
class Pair:
    """Two groups and their difference, first minus second; `p` is corrected for all pairs that are compared."""

    first: Group
    second: Group
    welch: Welch
    p: float = math.nan


def find(paths: Iterable[str]) -> dict[Path, dict[str, Any]]:
    """The contents of the `metrics.json` of all runs at or below these paths, by their place.

    Raises:
        UserError: there is no such path, or no run in it, or a file that cannot be read.
    """
    found: dict[Path, dict[str, Any]] = {}
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise UserError(
                f"{given}: no such file or folder. Name a run's folder, its metrics.json, or a folder above runs."
            )
        files = [path] if path.is_file() else sorted(path.rglob("metrics.json"))
        runs = {file.resolve(): metrics for file in files if (metrics := read(file)).keys() >= RECORD}
        if not runs:
            raise UserError(
                f"{given} holds no finished run (a metrics.json as cifarnet.train writes at the end). "
                "Name a run's folder, its metrics.json, or a folder above runs."
            )
        found |= runs
    return found


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty if it is no dictionary, and so no run's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Repeat that run, or name the folders of the others."
        ) from error
    return content if isinstance(content, dict) else {}


def is_time(metric: str) -> bool:
    """Does it depend on the hardware?"""
    return "second" in metric


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("cross_entropy", "seconds", "epochs", "parameters"))


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as `section.key: text`; what is null is left out, and 1.0 is 1."""
    settings: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            settings[prefix + key] = value
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer()
            settings[prefix + key] = json.dumps(int(value) if whole else value)
    return settings


def make_runs(found: dict[Path, dict[str, Any]], metric: str) -> list[Run]:
    """Runs with the settings that can decide the metric: without seed and folder, which only tell replicas apart."""
    configs = [flat(metrics["config"]) for metrics in found.values()]
    runs = [
        Run(path, metrics, {key: value for key, value in config.items() if _decides(key, value, config, metric)})
        for (path, metrics), config in zip(found.items(), configs, strict=True)
    ]
    for key, leader in FOLLOWS.items():
        fixed = {config.get(key) for config in configs if config.get(key) != config.get(leader)}
        for run, config in zip(runs, configs, strict=True):
            if key in config and config[key] == config.get(leader) and config[key] not in fixed:
                run.settings[key] = f"= {leader}"
    return runs


def _decides(key: str, value: str, config: dict[str, str], metric: str) -> bool:
    """Can a figure depend on this setting?"""
    section, _, name = key.partition(".")
    folder = config.get("output_dir")
    if section in REPLICA or key in WHERE or value == folder or value.startswith(f"{folder}/"):
        return False
    if section == "trainer" and name in PRINTING:
        return False
    if section == "callbacks":
        callback = f"callbacks.{name.partition('.')[0]}"
        target = config.get(f"{callback}._target_", "")
        keeps_only = target.endswith(".ModelCheckpoint") and f"{callback}.monitor" not in config
        return target not in WATCHING and not keeps_only
    return is_time(metric) or key not in SPEED | HARDWARE


def grouped(runs: Sequence[Run], metric: str, baseline: bool = False) -> list[Group]:
    """Runs on the same images that differ only by seed together, the best mean first.

    A run with a seed that was run before repeats it and is no further sample: the one that finished last counts. Times
    are another matter: they vary between runs of one seed too.
    """
    kept: dict[tuple, dict[tuple, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.metrics["finished"]):
        same = (run.metrics["seed"], run.metrics["finished"] if is_time(metric) else None)
        recipe = (*sorted(run.settings.items()), _data(run.metrics))
        kept.setdefault(recipe, {}).setdefault(same, []).append(run)
    groups = []
    for by_seed in kept.values():
        latest = [same[-1] for _, same in sorted(by_seed.items(), key=lambda item: item[0])]
        repeats = [run for same in by_seed.values() for run in same[:-1]]
        groups.append(Group(latest, [float(run.metrics[metric]) for run in latest], repeats, baseline))
    return sorted(groups, key=lambda group: group.mean, reverse=not lower_is_better(metric))


def check_metric(runs: Sequence[Run], metric: str) -> None:
    """Refuse a metric for which none of the runs has a number."""
    if any(_is_number(run.metrics.get(metric)) for run in runs):
        return
    path, metrics = runs[0].path, runs[0].metrics
    null = " (it is null there: without validation images there is no val_accuracy)" if metric in metrics else ""
    numbers = ", ".join(key for key, value in metrics.items() if _is_number(value))
    raise UserError(f"--metric {metric}: {os.path.relpath(path)} has no such number{null}. It has {numbers}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Each group with each baseline, or, without baselines, the best with each other group."""
    baselines = [group for group in groups if group.baseline]
    others = [group for group in groups if not group.baseline]
    if baselines:
        chosen = [(first, second) for second in baselines for first in others]
    else:
        chosen = [(others[0], second) for second in others[1:]]
    pairs = [Pair(first, second, welch(first.values, second.values)) for first, second in chosen]
    for pair, p in zip(pairs, holm([pair.welch.p for pair in pairs]), strict=True):
        pair.p = p
    return pairs


def varied(groups: Sequence[Group]) -> list[str]:
    """The settings that are not the same in all groups.

    Where different classes are built, a setting that only one of them has is named by the class alone.
    """
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    return [key for key in keys if _varies(key, groups)]


def _varies(key: str, groups: Sequence[Group]) -> bool:
    built: dict[str, set[str | None]] = {}
    for group in groups:
        built.setdefault(_builder(key, group.settings), set()).add(group.settings.get(key))
    if key.endswith("_target_"):
        return len(built) > 1
    present = {group.settings[key] for group in groups if key in group.settings}
    return len(present) > 1 or any(len(values) > 1 for values in built.values())


def _builder(key: str, settings: dict[str, str]) -> str:
    """The class or function that takes this setting."""
    parts = key.split(".")[:-1]
    targets = [settings.get(".".join([*parts[:depth], "_target_"]), "") for depth in range(len(parts), 0, -1)]
    return next(filter(None, targets), "")


def _shown(key: str, settings: dict[str, str]) -> str:
    value = settings.get(key, "none")
    return value.rpartition(".")[2] if key.endswith("_target_") else value


@dataclass(frozen=True)
class Unit:
    """How a metric's values are written."""

    factor: float
    decimals: int
    symbol: str
    points: str  # of a difference

    @classmethod
    def of(cls, metric: str, values: Iterable[float]) -> "Unit":
        if "accuracy" in metric:
            return cls(100, 2, " %", " points")
        largest = max(map(abs, values))
        decimals = max(0, 3 - math.floor(math.log10(largest))) if largest else 0  # four digits of the largest
        symbol = " images/s" if metric == "images_per_second" else " s" if is_time(metric) else ""
        return cls(1, decimals, symbol, symbol)

    def number(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign},.{self.decimals}f}"

    def of_group(self, group: Group) -> str:
        spread = f" ± {self.number(group.deviation)}" if len(group.values) > 1 else ""
        return f"{self.number(group.mean)}{spread}{self.symbol}"


def table(groups: Sequence[Group], metric: str, unit: Unit) -> str:
    """The groups as lines of text; what differs between them in columns, or below if it is much."""
    keys = varied(groups)
    columns = keys if len(keys) <= 4 else []
    several_folders = len({group.folder for group in groups}) > 1
    heads = [key.removesuffix("._target_") for key in columns]
    rows = [["", "", metric.replace("_", " "), "n", *heads, *(["folder"] if several_folders else [])]]
    for group in groups:
        settings = [_shown(key, group.settings) for key in columns]
        row = [group.label, group.name, unit.of_group(group), str(len(group.values)), *settings]
        rows.append([*row, *([group.folder] if several_folders else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if not columns and keys:
        lines += ["", f"  different in {' / '.join(group.label for group in groups)}:"]
        lines += [
            f"    {key.removesuffix('._target_')}: {' / '.join(_shown(key, group.settings) for group in groups)}"
            for key in keys
        ]
    return "\n".join(lines)


def verdict(pair: Pair, metric: str, unit: Unit, comparisons: int) -> str:
    """The difference, its interval and p-value, what follows, and on another line what would be needed to tell."""
    first, second, found = pair.first, pair.second, pair.welch
    line = f"{first.label} - {second.label}: {unit.number(found.difference, '+')}{unit.points}"
    if min(len(first.values), len(second.values)) < 2:
        return f"{line}; no interval: at least 2 seeds of each are needed"
    if math.isnan(found.p):
        return f"{line}; no interval: neither group's values vary, so nothing is known about luck"
    line += f", 95 % interval {unit.number(found.low, '+')} to {unit.number(found.high, '+')}"
    line += ", p < 0.0001" if pair.p < 0.0001 else f", p = {pair.p:.2g}"
    if pair.p <= LEVEL:
        better = first if (found.difference < 0) == lower_is_better(metric) else second
        return f"{line}: {better.label} is better"
    return f"{line}: not distinguishable{more_seeds(pair, comparisons)}"


def more_seeds(pair: Pair, comparisons: int) -> str:
    """How many more seeds the test would need to find a difference as large as the one observed."""
    first, second = pair.first, pair.second
    if pair.welch.difference == 0:
        return ""
    # Bonferroni's level: what Holm asks of the smallest p-value
    needed = seeds_needed(pair.welch.difference, (first.deviation, second.deviation), LEVEL / comparisons)
    if needed is None:
        return f"\n    more than {MOST_SEEDS:,} seeds each would be needed to tell a difference of this size"
    missing = [max(0, needed - len(group.values)) for group in (first, second)]
    if not any(missing):
        return ""
    if missing[0] == missing[1]:
        count = f"{missing[0]:,} more seed{'s' if missing[0] > 1 else ''} each"
    else:
        count = f"{missing[0]:,} more seeds of {first.label} and {missing[1]:,} of {second.label}"
    return f"\n    about {count} would be needed to tell a difference of this size (power {100 * POWER:.0f} %)"


def notes(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    """How the figures below the table came about."""
    tested = sum(math.isfinite(pair.p) for pair in pairs)
    others, baselines = (sum(group.baseline == side for group in groups) for side in (False, True))
    lines = [] if pairs else ["One group: nothing to compare it with."]
    if baselines and others * baselines > 1:
        lines.append(f"{others} of the runs' groups are compared with {baselines} to compare against, each with each.")
    if tested == 1:
        lines.append("p: Welch's t-test, two-sided.")
    elif tested:
        lines.append(
            f"p: Welch's t-test, two-sided, corrected for {tested} comparisons by Holm's method. "
            "Each interval is for its one comparison."
        )
    if others > 1 and len(pairs) > 1:
        best = groups[0].label
        lines.append(f"{best} is the best of {others} by these very figures, which flatters it: repeat with new seeds.")
    return lines


def warnings(groups: Sequence[Group], metric: str) -> list[str]:
    """What makes the groups' figures less comparable than they look."""
    lines = []
    for group in groups:
        if group.repeats:
            folders = ", ".join(os.path.relpath(run.path.parent) for run in group.repeats)
            lines.append(
                f"a seed counts once: of {group.label}, {folders} is no further sample, "
                "but repeats a run that finished later."
            )
        if len(group.values) == 1:
            lines.append(f"{group.label} has one seed: no deviation and no interval. Train at least 2.")
    for what, describe in _circumstances(metric).items():
        if differing := _differing(groups, describe):
            lines.append(f"{what}: {differing}")
    if any("-dirty" in str(run.metrics.get("git_commit")) for group in groups for run in group.runs):
        lines.append("some code was changed after its commit (-dirty): whether all ran the same is not recorded.")
    return lines


def _circumstances(metric: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What is to be alike, and how to read it from `metrics.json`."""
    described: dict[str, Callable[[dict[str, Any]], Any]] = {
        "the data differ": _data,
        "PyTorch differs": lambda metrics: metrics.get("versions", {}).get("torch"),
        "the code differs": lambda metrics: (metrics.get("git_commit") or "unknown")[:8],
    }
    if metric in ("test_accuracy", "test_cross_entropy"):
        described["test-time augmentation differs (test_accuracy_one_view is without)"] = lambda m: m.get("tta")
    if is_time(metric):
        described["the hardware differs"] = _hardware
        described["other versions differ"] = lambda metrics: ", ".join(
            f"{name} {version}" for name, version in metrics.get("versions", {}).items() if name != "torch"
        )
    return described


def _data(metrics: dict[str, Any]) -> str:
    data = metrics["data"]
    counts = " / ".join(f"{data[split]:,}" for split in ("train", "val", "test"))
    checksum = data["sha256"][:8] if data["sha256"] else f"unknown, {metrics['config']['data'].get('root')}"
    return f"{counts} images to train / validate / test, {data['classes']} classes, checksum {checksum}"


def _hardware(metrics: dict[str, Any]) -> str:
    hardware = metrics.get("hardware", {})
    return f"{hardware.get('name')}, {hardware.get('threads')} threads, {hardware.get('system')}"


def _differing(groups: Sequence[Group], describe: Callable[[dict[str, Any]], Any]) -> str:
    """Each description with the groups it holds for, or nothing if there is but one."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for description in dict.fromkeys(str(describe(run.metrics)) for run in group.runs):
            found.setdefault(description, []).append(group.label)
    return "; ".join(f"{key} ({', '.join(labels)})" for key, labels in found.items()) if len(found) > 1 else ""


def plot(groups: Sequence[Group], metric: str, path: Path) -> None:
    """Each group's runs, mean and interval, into an image file."""
    from cifarnet import report

    keys = varied(groups)
    rows = []
    for group in groups:
        settings = [f"{key.removesuffix('._target_')}={_shown(key, group.settings)}" for key in keys[:3]]
        title = "\n".join([f"{group.label}  {group.name}, n = {len(group.values)}", *settings])
        rows.append((title, group.values, interval(group.values)))
    figure = report.comparison(rows, metric.replace("_", " "), percent="accuracy" in metric)
    temporary = Path(f"{path}.tmp")
    try:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png")
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: an image format that matplotlib does not know
        temporary.unlink(missing_ok=True)
        raise UserError(f"--output {path} cannot be written: {error}") from error


def letter(number: int) -> str:
    """a to z, then aa, ab, …"""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def load(places: Sequence[str], against: Sequence[str], metric: str) -> tuple[list[Group], list[Run]]:
    """The groups, labelled, those of `against` last; and the runs left out because their metric is null.

    Raises:
        UserError: there is nothing to compare, or a file cannot be read.
    """
    baseline = find(against)
    found = {path: metrics for path, metrics in find(places).items() if path not in baseline}
    if not found:
        raise UserError(f"{' '.join(places)} holds no run that --against {' '.join(against)} does not.")
    runs = make_runs(found | baseline, metric)
    groups, without = [], []
    for is_baseline in (False, True) if baseline else (False,):
        side = [run for run in runs if (run.path in baseline) == is_baseline]
        check_metric(side, metric)
        without += [run for run in side if not _is_number(run.metrics.get(metric))]
        groups += grouped([run for run in side if _is_number(run.metrics.get(metric))], metric, is_baseline)
    for number, group in enumerate(groups):
        group.label = letter(number)
    return groups, without


def compare(places: Sequence[str], against: Sequence[str], metric: str, output: Path) -> None:
    """Print the comparison and draw it.

    Args:
        places: runs' folders, `metrics.json` files, or folders above runs; those in `against` too count there alone.
        against: the baseline; may be empty.
        metric: a number in `metrics.json`.
        output: where the picture goes.

    Raises:
        UserError: there is nothing to compare, a file cannot be read, or the picture cannot be written.
    """
    groups, without = load(places, against, metric)
    pairs = pairs_of(groups)
    unit = Unit.of(metric, [value for group in groups for value in group.values])
    tested = sum(math.isfinite(pair.p) for pair in pairs)
    print(f"\n{table(groups, metric, unit)}\n")
    for pair in pairs:
        print(f"  {verdict(pair, metric, unit, tested)}")
    for note in notes(groups, pairs):
        print(f"  {note}")
    for run in without:
        print(f"  warning: {os.path.relpath(run.path.parent)} is left out: its {metric} is null.")
    for warning in warnings(groups, metric):
        print(f"  warning: {warning}")
    plot(groups, metric, output)
    print(f"  {output}\n")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        "cifarnet.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = "runs' folders, metrics.json files, or folders above runs, such as a sweep's"
    arguments.add_argument("places", nargs="+", metavar="RUNS", help=kinds)
    arguments.add_argument("--against", nargs="+", default=[], metavar="RUNS", help="the baseline: places like those")
    arguments.add_argument(
        "--metric", default="test_accuracy", help="a number in metrics.json: val_accuracy, seconds, … (%(default)s)"
    )
    arguments.add_argument(
        "--output", type=Path, default=Path("comparison.png"), help="the picture, also .pdf or .svg (%(default)s)"
    )
    return arguments


def main() -> None:
    """The command `python -m cifarnet.compare`."""
    cli.run(lambda: compare(**vars(parser().parse_args())))


if __name__ == "__main__":
    main()
