"""Run a speedrun script of somebody else's, n times, on a GPU as it is, or ported to a CPU.

    python benchmarks/peer.py <folder>/airbench94_muon.py --runs 3 [--device cpu]

`<folder>` also holds `cifar10/train.pt` and `cifar10/test.pt`, which `benchmarks/speedrun.py` writes. Prints one line
of JSON a run: accuracy with test-time augmentation, and seconds by the script's own clock (whitening, training and
that last evaluation; neither reading data nor the warm-up run).

The port to a CPU is what such a script needs to run well there: bfloat16 autocast in place of half precision, freed
memory kept, no compilation. Its recipe is untouched.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
import types
from pathlib import Path

import torch

from cifarnet import hardware

FOR_CPU = {
    ".cuda()": "",
    '"cuda"': '"cpu"',
    ".half()": ".float()",
    "torch.half": "torch.float",
    "@torch.compile(fullgraph=True)": "",
    '@torch.compile(mode="max-autotune", fullgraph=True)': "",
    "@torch.compile()": "",
    "@torch.compile": "",
    "torch.cuda.Event(enable_timing=True)": "_Clock()",
    "torch.cuda.synchronize()": "None",
}


class _Clock:
    """What `torch.cuda.Event` is on a GPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "_Clock") -> float:
        """Milliseconds."""
        return 1000 * (end.time - self.time)


def load(path: Path, device: str) -> types.ModuleType:
    """The script as a module; what it runs as a command is left out."""
    source = path.read_text(encoding="utf-8")
    if device == "cpu":
        for there, here in FOR_CPU.items():
            source = source.replace(there, here)
    module = types.ModuleType("peer")
    module.__dict__["_Clock"] = _Clock
    sys.argv[0] = str(path)  # such scripts read themselves
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count on")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    path = arguments.script.resolve()
    os.chdir(path.parent)
    if not Path("cifar10/train.pt").is_file():
        sys.exit(f"{path.parent}/cifar10/train.pt is missing: benchmarks/speedrun.py --write {path.parent} makes it.")

    peer = load(path, arguments.device)
    model = peer.CifarNet().to(arguments.device, memory_format=torch.channels_last)
    if arguments.device == "cpu":
        hardware.keep_freed_memory()
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    else:
        model.compile(mode="max-autotune")
        with contextlib.redirect_stdout(io.StringIO()):
            peer.main("warmup", model)
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        torch.manual_seed(seed)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = peer.main(seed, model)
        if isinstance(result, tuple):  # (accuracy, accuracy with augmentation, seconds)
            accuracy, seconds = result[1:]
        else:  # the seconds are in the last line of its table
            accuracy = result
            seconds = float([line for line in printed.getvalue().splitlines() if "|" in line][-1].split("|")[-2])
        print(json.dumps({"seed": seed, "accuracy": accuracy, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
