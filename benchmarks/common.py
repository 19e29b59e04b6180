"""Shared code of the benchmarks: alternating measurements, each in its own process; table, plot and JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, turns: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all benchmarks."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--turns", type=int, default=turns, help="measurements of each variant")
    arguments.add_argument("--only", nargs="*", help="measure only these variants")
    arguments.add_argument("--measure", help=argparse.SUPPRESS)  # measures one variant, in its own process
    arguments.add_argument(
        "overrides", nargs="*", help="settings of all variants, such as trainer=gpu or data.batch_size=128"
    )
    return arguments


def take_turns(
    sides: dict[str, Callable[[Sequence[str]], float]], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Measure all variants in turn, repeatedly, so that a temporary load on the machine affects all of them.

    Each measurement uses a new process, because allocator settings and warm caches would affect the next variant.

    Args:
        sides: the variants, as functions of the overrides.
    """
    if arguments.measure:
        print(json.dumps({"value": sides[arguments.measure](arguments.overrides)}))
        sys.exit()
    chosen = [name for name in sides if not arguments.only or name in arguments.only]
    values: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(arguments.turns):
        for name in chosen:
            command = [sys.executable, sys.argv[0], "--measure", name, *arguments.overrides]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                sys.exit(f"{name} failed:\n{result.stderr}")
            values[name].append(json.loads(result.stdout.splitlines()[-1])["value"])
            print(f"turn {turn + 1}: {name}: {values[name][-1]:,.4g}", flush=True)
    return values


def report(name: str, unit: str, values: dict[str, list[float]], base: str | None = None, **facts: Any) -> None:
    """Print medians, ranges and ratios to `base`, and write them as JSON and as a plot."""
    import torch

    from cifarnet.system import hardware

    medians = {side: statistics.median(measured) for side, measured in values.items()}
    base = base if base in medians else next(iter(medians))
    machine = hardware.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    packages = {package: _version(package) for package in ("torch", "torchvision", "lightning", "keras", "tensorflow")}
    packages = {"python": platform.python_version()} | {key: found for key, found in packages.items() if found}

    print(f"\n{name}: {machine['name']}, {machine['threads']} threads, {machine['system']}")
    print(", ".join(f"{key} {value}" for key, value in packages.items()))
    print(*(f"{key}: {value}" for key, value in facts.items() if not isinstance(value, dict)), sep="\n")
    print(f"\n| | {unit}, median | range | ratio |\n| --- | ---: | ---: | ---: |")
    for side, median in medians.items():
        low, high = min(values[side]), max(values[side])
        print(f"| {side} | {median:,.4g} | {low:,.4g} - {high:,.4g} | {median / medians[base]:.3g} |")

    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, "unit": unit, "medians": medians, "values": values, "facts": facts}
    content |= {"machine": machine, "versions": packages, "date": time.strftime("%Y-%m-%d")}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(medians)), dpi=120, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(list(medians), list(medians.values()), color="#0969da", height=0.6)
    axis.bar_label(bars, fmt="{:,.4g}", padding=4)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel=unit, title=f"{name}: {machine['name']}, {machine['threads']} threads")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png")


def train(experiment: str, *overrides: str) -> dict[str, Any]:
    """Run an experiment with `callbacks=lean` in a new process and a temporary folder, and return its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cifarnet.train", f"+experiment={experiment}", "callbacks=lean", "~logger"]
        command += [*overrides, f"hydra.run.dir={folder}"]
        here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": here}  # to import networks that a benchmark defines
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(Path(folder, "metrics.json").read_text())


def mean_and_deviation(shares: Sequence[float]) -> str:
    """Format the mean and the standard deviation in percent; for a single value, only the value."""
    values = [100 * share for share in shares]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def p_above(values: Sequence[float], target: float) -> float:
    """Return the p-value of a one-sided t-test; if it is small, the mean is above the target."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, target, alternative="greater").pvalue)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
