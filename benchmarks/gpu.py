"""All measurements on a GPU, in one command that takes at most 20 minutes.

    python benchmarks/gpu.py [--peers <folder>/airbench94_muon.py …] -- data=folder data.root=…

Each part runs in its own process and has a share of the time. Each measurement is written to `results/gpu.json`
immediately, so a part that fails or exceeds its time does not affect the others.

- tests: the tests that require a GPU
- steps: `baseline` in images/s and ms per step, in a bare loop (raw twin), in the Trainer, and compiled in each mode
- networks: the same for `speedrun` and `resnet18`, and peak memory
- profile: the kernels that take the most time in a step of `baseline` and of `speedrun`
- speedrun: time and accuracy of complete runs, not compiled and in each mode of `compile`, alternating with
  the scripts of other projects
- baseline: the same for `baseline`, not compiled and compiled

All times are measured by this script. They exclude reading data, building, compiling, and a warm-up at every size of
`data.train_sizes`. They include whitening, the transfer of the data to the device, training, and the test with
test-time augmentation, which is also reported separately. "above 94%" is tested with a one-sided t-test.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import common
from steps import build_steps, compose_baseline, now
from trainer_overhead import lean, raw_twin

HERE, RESULTS = Path(__file__).parent, common.RESULTS / "gpu.json"
# in seconds; 1,200 in total
PARTS = {"tests": 90, "steps": 150, "networks": 120, "profile": 60, "speedrun": 500, "baseline": 280}
MODES = ["false", "default", "reduce-overhead", "max-autotune-no-cudagraphs"]
Measurement = tuple[str, dict[str, Any]]  # (name, results)


def tests(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Run the tests that are skipped without a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", "tests/test_train.py", "tests/test_evaluate.py"]
    result = subprocess.run([*command, "tests/data"], cwd=HERE.parent, capture_output=True, text=True, check=False)
    yield "tests", {"outcome": result.stdout.strip().splitlines()[-1], "status": result.returncode}


def steps(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Measure `baseline` in a bare loop, in the Trainer, and compiled in each mode."""
    sides = {f"Trainer, compile={mode}": (lean, [*arguments.overrides, f"compile={mode}"]) for mode in MODES}
    yield from _rates({"raw twin": (raw_twin, arguments.overrides)} | sides, arguments.turns)


def networks(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Measure other experiments in the Trainer."""
    chosen = itertools.product(("speedrun", "resnet18"), MODES[:2])
    settings = {of: [f"+experiment={of[0]}", *arguments.overrides, f"compile={of[1]}"] for of in chosen}
    sides = {f"{name}, compile={mode}": (lean, words) for (name, mode), words in settings.items()}
    yield from _rates(sides, arguments.turns)


def _rates(
    sides: dict[str, tuple[Callable[[Sequence[str]], float], Sequence[str]]], turns: int
) -> Iterator[Measurement]:
    """Measure ms per step, images/s and the peak GPU memory. `sides` are functions that return ms per step."""
    for turn in range(turns):
        for name, (measure, settings) in sides.items():
            size = compose_baseline(*settings).data.batch_size
            _memory()  # resets the peak
            milliseconds = measure(settings)
            rates = {"ms a step": milliseconds, "images/s": 1000 * size / milliseconds}
            yield name, {"turn": turn, **rates, **_memory()}


def profile(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Profile training steps: the largest kernels and their shares of the time."""
    from lightning.pytorch.callbacks import Callback
    from torch.profiler import ProfilerActivity

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]

    class Profile(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 20:
                self.profiler = torch.profiler.profile(activities=activities)
                self.profiler.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 29:
                now(module.device)
                self.profiler.stop()

    for experiment in ("baseline", "speedrun"):
        built = build_steps(compose_baseline(f"+experiment={experiment}", *arguments.overrides), [one := Profile()])
        built.trainer.fit(built.classifier, datamodule=built.data)
        time_of = {
            event.key: getattr(event, f"self_{'device' if gpu else 'cpu'}_time_total")
            for event in one.profiler.key_averages()
        }
        whole = sum(time_of.values())
        largest = sorted(time_of, key=time_of.get, reverse=True)[:12]
        yield experiment, {"ms in 10 steps": whole / 1000, **{key: f"{time_of[key] / whole:.1%}" for key in largest}}


def speedrun(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Measure complete runs of `speedrun` and of the scripts of other projects."""
    yield from _runs("speedrun", MODES, arguments.peers, arguments)


def baseline(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Measure complete runs of `baseline`."""
    yield from _runs("baseline", MODES[:2], [], arguments)


def _runs(
    experiment: str, modes: Sequence[str], scripts: Sequence[Path], arguments: argparse.Namespace
) -> Iterator[Measurement]:
    """Alternate between all variants, each in its own persistent process, so that each compiles once."""
    own = [sys.executable, __file__, "--worker", experiment, "--runs", str(arguments.runs)]
    commands = {
        f"{experiment}, compile={mode}": [*own, "--", *arguments.overrides, f"compile={mode}"] for mode in modes
    }
    for script in scripts:
        theirs = [sys.executable, str(HERE / "peer.py"), str(script), "--wait", f"--runs={arguments.runs}"]
        commands[script.stem] = theirs
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}  # all compile at once
    for name, worker in list(workers.items()):
        if _answer(worker) is None:  # a worker reports when it is ready
            yield name, {"failed": f"it ended with status {workers.pop(name).wait()}"}
    for _ in range(arguments.runs):
        for name, worker in list(workers.items()):
            worker.stdin.write("\n")
            worker.stdin.flush()
            if (measured := _answer(worker)) is None:
                yield name, {"failed": f"it ended with status {workers.pop(name).wait()}"}
            else:
                yield name, measured


def _answer(worker: subprocess.Popen) -> dict[str, Any] | None:
    """Return the next line of JSON; None if the process has ended."""
    for line in worker.stdout:
        if line.startswith("{"):  # ignore other output
            return json.loads(line)
    return None


def work(experiment: str, runs: int, overrides: Sequence[str]) -> None:
    """Run one experiment repeatedly in one process, once per line of input."""
    from lightning.pytorch.callbacks import Callback

    from cifarnet.build import build
    from cifarnet.callbacks.compilation import Compile, warm_up
    from cifarnet.cli import compose
    from steps import prepare

    class WarmUp(Callback):  # for networks that are not compiled; otherwise Compile warms up
        seconds = 0.0

        def on_train_start(self, trainer: Any, module: Any) -> None:
            start = now(module.device)
            warm_up(trainer, module)
            self.seconds = now(module.device) - start

    def run(seed: int, **few: Any) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            chosen = [f"+experiment={experiment}", "callbacks=lean", "~logger", f"output_dir={folder}", f"seed={seed}"]
            config = compose("train", [*chosen, *overrides])
            prepare(config)
            built = build(config, [] if config.compile else [WarmUp()], **few)
            device = built.trainer.strategy.root_device
            start = now(device)
            built.trainer.fit(built.classifier, datamodule=built.data)
            trained = now(device)
            built.trainer.test(built.classifier, datamodule=built.data, verbose=False)
            tested = now(device)
        free = sum(one.seconds for one in built.trainer.callbacks if isinstance(one, Compile | WarmUp))
        means = built.classifier.means("test") | built.classifier.means("one_view")
        return {
            "seed": seed,
            "accuracy": means["test/accuracy"],
            "accuracy of one view": means["one_view/accuracy"],
            "seconds": tested - start - free + built.fit_seconds,
            "test_seconds": tested - trained,
        }

    run(0, limit_train_batches=2)
    print(json.dumps({"ready": True}), flush=True)
    for seed in range(runs):
        if not sys.stdin.readline():  # the parent process has ended
            break
        print(json.dumps(run(seed)), flush=True)


def _memory() -> dict[str, float]:
    """Return the peak memory since the last call."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return {"MiB at most": round(peak)}


def measure_part(name: str, seconds: float, kept: dict[str, Any]) -> None:
    """Run a part in its own process and save its measurements immediately."""
    kept["parts"][name] = found = {"measured": {}}
    command, start = [sys.executable, __file__, "--part", name, *sys.argv[1:]], time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    clock = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGTERM))
    clock.start()
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
        if line.startswith("{"):
            content = json.loads(line)
            found["measured"].setdefault(content["of"], []).append(content["measured"])
            RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    status = process.wait()
    clock.cancel()
    found["seconds"] = round(time.monotonic() - start, 1)
    found["ended"] = {0: "whole", -signal.SIGTERM: "its time was over"}.get(status, f"it failed with status {status}")
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


def table(kept: dict[str, Any]) -> str:
    """Return a Markdown list for each part, with medians of repeated measurements."""
    lines = []
    for part, found in kept["parts"].items():
        lines += [f"\n## {part} ({found['ended']}, {found['seconds']:.0f} s)"]
        for name, measured in found["measured"].items():
            rows = [one for one in measured if "failed" not in one]
            failed = [one["failed"] for one in measured if "failed" in one]
            facts = [
                f"{key} {_summary(key, [row[key] for row in rows])}"
                for key in (rows[0] if rows else {})
                if key not in ("turn", "seed")
            ]
            lines.append(f"- {name}: {'; '.join([*facts, *failed])} (n = {len(rows)})")
            if len(rows) > 1 and "accuracy" in rows[0]:
                lines.append(f"  {reaches([row['accuracy'] for row in rows], 0.94)}")
    return "\n".join(lines)


def reaches(accuracies: Sequence[float], goal: float) -> str:
    """Test with a one-sided t-test whether the mean is above the goal."""
    from scipy.stats import ttest_1samp

    p = ttest_1samp(accuracies, goal, alternative="greater").pvalue
    return f"mean {statistics.mean(accuracies):.2%}; that it is above {goal:.0%}: p = {p:.3g}"


def _summary(key: str, values: Sequence[Any]) -> str:
    if not all(isinstance(value, int | float) for value in values):
        return str(values[-1])
    if key.startswith("accuracy"):
        return f"{common.mean_and_deviation(values)} %"
    return f"{statistics.median(values):,.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="run only these parts")
    parser.add_argument("--minutes", type=float, default=20, help="time limit of all parts together")
    parser.add_argument("--peers", nargs="*", type=Path, default=[], help="scripts to compare with `speedrun`")
    parser.add_argument("--runs", type=int, default=20, help="complete runs of each variant, with seeds 0, 1, …")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each rate")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings of all variants, such as data=folder")
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.runs, arguments.overrides)
    if arguments.part:
        for of, measured in globals()[arguments.part](arguments):
            print(json.dumps({"of": of, "measured": measured}), flush=True)
        return None

    if arguments.peers:
        from speedrun import write

        for folder in {script.parent for script in arguments.peers}:
            write(folder, arguments.overrides)
    from cifarnet.system import hardware

    machine = hardware.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kept = {"machine": machine, "versions": hardware.versions(), "date": time.strftime("%Y-%m-%d"), "parts": {}}
    kept |= {"commit": hardware.git_commit(), "settings": arguments.overrides}
    over = time.monotonic() + 60 * arguments.minutes
    for place, name in enumerate(arguments.parts):  # unused time goes to the remaining parts
        shares = [PARTS[part] for part in arguments.parts[place:]]
        measure_part(name, (over - time.monotonic()) * shares[0] / sum(shares), kept)
    print(f"\n{machine['name']}, {kept['versions']}, {kept['date']}, {kept['commit']}{table(kept)}")


if __name__ == "__main__":
    main()
