"""Time to accuracy: `+experiment=speedrun` compared with the record scripts of other projects, measured alternately.

The seconds of all variants include whitening, training, and the final evaluation with test-time augmentation. They do
not include reading the data, building the network and compilation, as in airbench. The seconds of the evaluation are
also reported separately, because some projects do not count them: never compare such a figure with these.

    python benchmarks/speedrun.py --runs 20 [--peers <folder>/airbench94_muon.py <folder>/cifar10_speedrun.py] [data=…]
    python benchmarks/speedrun.py --write <folder> [data=…]

Download the scripts yourself (https://github.com/KellerJordan/cifar10-airbench,
https://github.com/hiverge/cifar10-speedrun). All variants train on the same images, which `data=…` selects. The images
are written next to each script, in the format that it reads.

`whole process` is the time from the start to the end of the process, including a script's warm-up run, divided by the
number of runs in it. `p` is the p-value of a one-sided t-test: if it is small, the mean accuracy is above `--target`.
On a CPU, `benchmarks/peer.py` ports the scripts.

On a GPU, use --runs-a-process, because each process of a script first compiles for a minute.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import common
from cifarnet.build import make_data
from cifarnet.cli import compose

HERE = Path(__file__).parent


def write(folder: Path, overrides: list[str]) -> None:
    """Write `cifar10/train.pt` and `cifar10/test.pt`, shuffled because the scripts whiten by the first images."""
    data = make_data(compose("train", ["+experiment=speedrun", "output_dir=/nowhere", *overrides]))
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for name, split in (("train", data.source.train), ("test", data.source.test)):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        images = split.images[order].permute(0, 2, 3, 1).contiguous()
        content = {"images": images, "labels": split.labels[order], "classes": data.class_names}
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def ours(experiment: str, seeds: range, overrides: list[str]) -> list[dict[str, float]]:
    """Return the accuracy and the seconds of each run, as `peer.py` does."""
    runs = [common.train(experiment, *overrides, f"seed={seed}") for seed in seeds]
    return [
        {
            "accuracy": run["test_accuracy"],
            "seconds": run["fit_seconds"] + run["seconds"] + run["test_seconds"],
            "test_seconds": run["test_seconds"],
        }
        for run in runs
    ]


def theirs(script: Path, seeds: range) -> list[dict[str, float]]:
    command = [sys.executable, str(HERE / "peer.py"), str(script), f"--runs={len(seeds)}", f"--seed={seeds.start}"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def main() -> None:
    parser = common.parser(__doc__, turns=1)
    parser.add_argument("--peers", nargs="*", type=Path, default=[], help="scripts to compare with")
    parser.add_argument("--ours", nargs="*", default=["speedrun"], help="experiments to run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each variant, with seeds 0, 1, …")
    parser.add_argument("--target", type=float, default=0.94, help="the accuracy that the mean should exceed")
    parser.add_argument("--runs-a-process", type=int, default=1)
    parser.add_argument("--write", type=Path, help="only write the data of the scripts into this folder")
    arguments = parser.parse_args()
    if arguments.write:
        return write(arguments.write, arguments.overrides)
    for folder in {script.parent for script in arguments.peers}:
        write(folder, arguments.overrides)

    sides: list[str | Path] = [*arguments.peers, *arguments.ours]
    accuracies: dict[str, list[float]] = {Path(side).stem: [] for side in sides}
    seconds, tests, whole = ({name: [] for name in accuracies} for _ in range(3))
    for first in range(0, arguments.runs, arguments.runs_a_process):
        seeds = range(first, min(first + arguments.runs_a_process, arguments.runs))
        for side in sides:
            name, start = Path(side).stem, time.perf_counter()
            runs = theirs(side, seeds) if isinstance(side, Path) else ours(side, seeds, arguments.overrides)
            whole[name].append((time.perf_counter() - start) / len(seeds))
            accuracies[name] += [run["accuracy"] for run in runs]
            seconds[name] += [run["seconds"] for run in runs]
            tests[name] += [run["test_seconds"] for run in runs]
            print(name, *(f"{run['accuracy']:.2%} in {run['seconds']:.2f} s" for run in runs), flush=True)

    facts: dict[str, Any] = {"target": arguments.target}
    for name, measured in accuracies.items():
        facts[f"{name}, accuracy"] = f"{common.mean_and_deviation(measured)} % (n = {len(measured)})"
        if len(measured) > 1:
            p = common.p_above(measured, arguments.target)
            facts[f"{name}, p of a mean accuracy above {arguments.target:.2%}"] = f"{p:.3g}"
        facts[f"{name}, final evaluation"] = f"{statistics.median(tests[name]):.2f} s of these seconds"
        facts[f"{name}, whole process"] = f"{statistics.median(whole[name]):.1f} s a run"
    common.report("speedrun", "seconds", seconds, **facts, accuracies=accuracies, test_seconds=tests)


if __name__ == "__main__":
    main()
