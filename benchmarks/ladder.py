"""The ladder: the best known recipe for each budget of time, with its seeds, seconds and command.

    python benchmarks/ladder.py [--seeds 3] [--only resnet20 baseline] [data=folder data.root=…]

This trains the runs that are missing for this hardware, one at a time, and continues after it was killed. The results
of each run are kept in results/ladder.json. The table in docs/zoo.md and its figure are generated from this file;
`--write` writes both without training.
"""

import hashlib
import json
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

import common
from cifarnet import cli
from cifarnet.checkpoint import Checkpoint
from cifarnet.config import deciding_settings
from cifarnet.errors import UserError, printable
from cifarnet.records.figures import save
from cifarnet.records.record import Record
from cifarnet.system import files, hardware

RESULTS = common.RESULTS / "ladder.json"
ROOT = Path(__file__).parents[1]
PAGE, FIGURE = ROOT / "docs/zoo.md", ROOT / "docs/images/ladder.png"
BEGIN, END = "<!-- written by benchmarks/ladder.py -->", "<!-- to here -->"

SHORT = ["speedrun_fast", "speedrun", "baseline", "baseline_muon"]
LONG = ["speedrun95", "speedrun96", "resnet20", "resnet18", "resnet18_long", "wide_resnet", "cct7"]
LADDER = {  # experiments and their overrides; on a CPU, only experiments that take less than an hour
    "cuda": dict.fromkeys(SHORT + LONG, ""),
    "cpu": dict.fromkeys(SHORT, "") | {"resnet20": "trainer.max_epochs=30"},
}
FROM_RECORD = (
    *("parameters", "epochs", "test_accuracy", "test_accuracy_one_view", "tta", "val_accuracy", "seed"),
    *("seconds", "images_per_second", "precision", "git_commit"),
)
COLUMNS = (
    *("`python -m cifarnet.train …`", "parameters", "GFLOP per image", "epochs", "test accuracy", "seconds"),
    *("images/s", "images", "hardware", "commit, date"),
)

Result = dict[str, Any]  # entries of a run's record to keep


def main() -> None:
    parser = common.parser(__doc__, turns=1)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each experiment")
    parser.add_argument("--write", action="store_true", help="write the table and the figure without training")
    arguments = parser.parse_args()
    results: list[Result] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    names = arguments.only or []  # argparse also puts settings that follow --only into this list
    overrides = [name for name in names if "=" in name] + arguments.overrides
    only = [name for name in names if "=" not in name]
    failed = [] if arguments.write else train_missing(results, only, arguments.seeds, overrides)
    write(results)
    if failed:
        sys.exit(f"These runs failed and are not in the table: {', '.join(failed)}")


def train_missing(results: list[Result], only: Sequence[str], seeds: int, overrides: list[str]) -> list[str]:
    """Train the missing runs, add their results to the list, and return the names of the runs that failed."""
    on_cpu = not torch.cuda.is_available() or {"trainer=cpu", "trainer.accelerator=cpu"} & set(overrides)
    device = torch.device("cpu" if on_cpu else "cuda")
    ladder, machine, failed = LADDER[device.type], hardware.describe(device)["name"], []
    if unknown := set(only) - set(ladder):
        sys.exit(f"No {', '.join(sorted(unknown))} on this hardware. Choose from {', '.join(ladder)}.")
    for seed in range(seeds):  # one seed of all experiments, then the next seed
        for name in only or ladder:
            settings = [*ladder[name].split(), *overrides]
            shown = [f"+experiment={name}", *(part for part in settings if cli.key_of(part) != "data.root")]
            run = {"command": " ".join(shown), "recipe": recipe(shown), "hardware": machine, "seed": seed}
            if any(run.items() <= result.items() for result in results):
                continue
            label = "_".join([*shown, run["recipe"]]).removeprefix("+experiment=")
            folder = ROOT / "lightning_logs/ladder" / machine / label / str(seed)
            status = train(folder, [f"+experiment={name}", *settings, f"seed={seed}"])
            if status in (130, 143):  # stopped after saving a checkpoint
                sys.exit(f"To continue, run the same command again: python {' '.join(sys.argv)}")
            if status:
                failed.append(f"{name} with seed {seed}")
                continue
            try:
                results.append(run | result_of(folder))
            except UserError as error:  # the record cannot be read
                print(printable(f"Error: {error}"), file=sys.stderr)
                failed.append(f"{name} with seed {seed}")
                continue
            files.write(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            write(results)
    return failed


def recipe(settings: Sequence[str]) -> str:
    """Return a checksum of the settings that these overrides select; it changes if the experiment is changed."""
    config: Any = OmegaConf.to_container(cli.compose("train", [*settings, "output_dir=run"]), resolve=False)
    written = json.dumps(deciding_settings(config, times=True), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:8]


def train(folder: Path, settings: list[str]) -> int:
    """Train or resume a run, unless the folder contains a finished run; return the exit status."""
    if (folder / "metrics.json").is_file():
        return 0
    if (folder / "checkpoints/last.ckpt").is_file():
        settings = [f"ckpt_path={cli.literal(str(folder))}"]
    else:
        settings = [*settings, f"hydra.run.dir={cli.literal(str(folder))}"]
    run = subprocess.Popen([sys.executable, "-m", "cifarnet.train", *settings])
    # wait until the run has saved a checkpoint; subprocess.run would kill it 0.25 s after a Ctrl-C
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)  # a terminal also sends it to the run
    terminate = signal.signal(signal.SIGTERM, lambda *_: run.terminate())
    try:
        return run.wait()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def result_of(folder: Path) -> Result:
    """Return the part of a run's record that the table shows."""
    record = Record.read(folder / "metrics.json")
    root = Path(record.resolved["data"].get("root", "")).name
    return {key: getattr(record, key) for key in FROM_RECORD} | {
        "gflop": gflop(folder),
        "images": root if record.data["source"] == "ImageFolder" else record.data["source"],
        "sha256": record.data["sha256"],
        "hardware": record.hardware["name"],
        "threads": record.hardware["threads"],
        "torch": record.versions["torch"],
        "date": record.finished[:10],
    }


def gflop(folder: Path) -> float:
    """Return the FLOP of a forward pass of one image: convolutions and matrix products, 2 FLOP per multiply-add."""
    checkpoint = Checkpoint.open(folder)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        checkpoint.network()(torch.zeros(1, 3, checkpoint.image_size, checkpoint.image_size))
    return counter.get_total_flops() / 1e9


def write(results: list[Result]) -> None:
    """Write the figure and the table, which has one row per command, hardware and data set.

    Results of recipes that have changed since are kept but not shown.
    """
    rows = defaultdict(list)
    current = {command: recipe(command.split()) for command in {result["command"] for result in results}}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result["recipe"] == current[result["command"]]:
            machine = "{hardware}, {threads} threads, {precision}, torch {torch}".format_map(result)
            rows[machine, result["images"], result.get("sha256"), result["command"]].append(result)
    rows = dict(sorted(rows.items(), key=lambda row: (row[0][:3], mean(row[1], "seconds"))))
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * 6 + " --- | --- | --- |"]
    for (machine, images, _, command), runs in rows.items():
        commits = dict.fromkeys(f"{commit(run)}, {run['date']}" for run in runs)
        cells = [f"`{command}`", f"{runs[0]['parameters']:,}", f"{runs[0]['gflop']:.3g}", str(runs[0]["epochs"])]
        cells += [accuracy(runs), f"{mean(runs, 'seconds'):,.0f}", f"{mean(runs, 'images_per_second'):,.0f}"]
        lines.append(f"| {' | '.join([*cells, images, machine, '; '.join(commits)])} |")
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    files.write(PAGE, "\n".join([before + BEGIN, "", *lines, "", END + after]))
    save(figure(rows), FIGURE)


def commit(run: Result) -> str:
    name, dirty, _ = (run["git_commit"] or "unknown").partition("-dirty")
    return name[:7] + dirty


def mean(runs: list[Result], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def accuracy(runs: list[Result]) -> str:
    """Return the mean ± standard deviation (number of runs), in percent."""
    tested, one_view = (
        common.mean_and_deviation([run[key] for run in runs]) for key in ("test_accuracy", "test_accuracy_one_view")
    )
    without = f"; {one_view} without {runs[0]['tta']}" if runs[0]["tta"] != "none" else ""
    return f"{tested}% ({len(runs)}{without})"


def figure(rows: dict[tuple[str, ...], list[Result]]) -> Figure:
    """Draw test accuracy against seconds of training, with one color per hardware and data set."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for machine, images in dict.fromkeys(row[:2] for row in rows):
        points = []
        for row, runs in rows.items():
            if row[:2] == (machine, images):
                values = [100 * run["test_accuracy"] for run in runs]
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                points.append((mean(runs, "seconds"), statistics.mean(values), deviation))
                name = row[3].split()[0].removeprefix("+experiment=")
                axis.annotate(name, points[-1][:2], xytext=(6, -12), textcoords="offset points")
        axis.errorbar(*zip(*points, strict=True), fmt="o", capsize=3, label=f"{images}, {machine}")
    axis.set(xlabel="seconds of training", ylabel="test accuracy, %", xscale="log", title="Accuracy against seconds")
    axis.margins(x=0.2, y=0.15)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if rows:
        axis.legend(frameon=False, loc="lower right", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
