"""Run a speedrun script of another project n times, unchanged on a GPU or ported to the CPU.

    python benchmarks/peer.py <folder>/airbench94_muon.py --runs 3 [--device cpu]

`<folder>` must also contain `cifar10/train.pt` and `cifar10/test.pt`, which `benchmarks/speedrun.py` writes. The
output is one line of JSON per run: the accuracy with test-time augmentation, the seconds as measured by the script
(whitening, training and the final evaluation, but not reading data and the warm-up run), and the seconds of this
evaluation.

Instead of `main`, a script can have `setup`, `reset_all` and `train`, like Fulcrum's script
(https://github.com/fulcrumresearch/cifar-10-speedrun). In this case, the last two are timed, and this module evaluates
the network with six views of each image.

The port to the CPU makes the changes that such a script needs to run fast: bfloat16 autocast instead of half
precision, keeping freed memory instead of returning it to the kernel, and no compilation. The recipe is unchanged.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

from cifarnet.models.tta import AveragedLogits
from cifarnet.system import hardware
from steps import now

FOR_CPU = {
    ".cuda()": "",
    '"cuda"': '"cpu"',
    ".half()": ".float()",
    "torch.half": "torch.float",
    "@torch.compile(fullgraph=True)": "",
    '@torch.compile(mode="max-autotune", fullgraph=True)': "",
    "@torch.compile()": "",
    "@torch.compile": "",
    'torch.compile(_forward_step_raw, mode="max-autotune", fullgraph=True)': "_forward_step_raw",
    "torch.cuda.Event(enable_timing=True)": "_Clock()",
    "torch.cuda.synchronize()": "None",
    ".pin_memory()": "",
}


class _Clock:
    """Replacement for `torch.cuda.Event` on a CPU."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "_Clock") -> float:
        """Return the time in milliseconds."""
        return 1000 * (end.time - self.time)


def load(path: Path, device: str) -> types.ModuleType:
    """Return the script as a module, without running its command."""
    source = path.read_text(encoding="utf-8")
    if device == "cpu":
        for there, here in FOR_CPU.items():
            source = source.replace(there, here)
    module = types.ModuleType("peer")
    module.__dict__["_Clock"] = _Clock
    sys.argv[0] = str(path)  # the scripts read their own source
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; each later run increments it")
    parser.add_argument("--wait", action="store_true", help="wait for a line of input before each run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    path = arguments.script.resolve()
    os.chdir(path.parent)
    if not Path("cifar10/train.pt").is_file():
        sys.exit(f"{path.parent}/cifar10/train.pt is missing. Run benchmarks/speedrun.py --write {path.parent}")

    peer, device = load(path, arguments.device), torch.device(arguments.device)
    if device.type == "cpu":
        hardware.keep_freed_memory()
    run = with_main(peer, device) if hasattr(peer, "main") else with_setup(peer, device)
    if arguments.wait:
        print(json.dumps({"ready": True}), flush=True)
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        if arguments.wait and not sys.stdin.readline():
            break  # the parent process has ended
        torch.manual_seed(seed)
        print(json.dumps({"seed": seed} | run(seed)), flush=True)


def with_main(peer: types.ModuleType, device: torch.device) -> Callable[[int], dict[str, float]]:
    """Return a function that calls `main(run, model)` and returns its accuracy, its seconds and its test's seconds."""
    model, took, evaluate = peer.CifarNet().to(device, memory_format=torch.channels_last), [], peer.evaluate

    def timed_evaluate(*arguments, **settings):
        start = now(device)
        result = evaluate(*arguments, **settings)
        took.append(now(device) - start)
        return result

    peer.evaluate = timed_evaluate
    if device.type == "cpu":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    else:
        model.compile(mode="max-autotune")
        with contextlib.redirect_stdout(io.StringIO()):
            peer.main("warmup", model)

    def run(seed: int) -> dict[str, float]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = peer.main(seed, model)
        if isinstance(result, tuple):  # (accuracy, accuracy with augmentation, seconds)
            accuracy, seconds = result[1:]
        else:  # the seconds are in the last line of its table
            accuracy = result
            seconds = float([line for line in printed.getvalue().splitlines() if "|" in line][-1].split("|")[-2])
        return {"accuracy": accuracy, "seconds": seconds, "test_seconds": took[-1]}

    return run


def with_setup(peer: types.ModuleType, device: torch.device) -> Callable[[int], dict[str, float]]:
    """Call `setup()` and return a function that times `reset_all(…)`, `train(…)` and the evaluation."""
    peer.DATA_PATH = "cifar10"
    if device.type == "cpu":
        peer.CifarNet.forward = torch.autocast("cpu", torch.bfloat16)(peer.CifarNet.forward)
    model, extra = peer.setup()
    loader, optimizers = extra["train_loader"], extra["optimizers"]
    test = peer.CifarLoader(peer.DATA_PATH, train=False, batch_size=2000)
    images = test.normalize(test.images)

    def run(seed: int) -> dict[str, float]:
        start = now(device)
        loader.epoch = 0
        if hasattr(peer, "_CACHE"):  # a second `setup` prepares a run
            peer.setup()
        else:
            peer.reset_all(model, loader, *optimizers)
            loader.proc_images.clear()  # so that each run prepares the images itself
        peer.train(model, extra, types.SimpleNamespace(validate=lambda *_, **__: None))
        trained = now(device)
        model.eval()
        with torch.inference_mode():
            answers = AveragedLogits(lambda views: model(views).float(), len(images.split(2000)))
            for batch in images.split(2000):
                answers.add(batch)
            right = torch.cat(answers.final()).argmax(1) == test.labels
        over = now(device)
        model.train()
        seconds = {"seconds": over - start, "test_seconds": over - trained}
        return {"accuracy": right.float().mean().item()} | seconds

    return run


if __name__ == "__main__":
    main()
