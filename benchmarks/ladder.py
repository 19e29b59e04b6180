"""The ladder: the best known recipe for each budget of time, with its seeds, seconds and command.

    python benchmarks/ladder.py [--seeds 3] [--only resnet20 baseline] [--untimed] [data=folder data.root=…]

This trains the runs that are missing for this hardware, one at a time, and continues after it was killed. Use
`--untimed` if other programs run at the same time: the seconds are then not recorded. The results of each run are kept
in results/ladder.json. The tables in docs/zoo.md and README.md, the figure, and the results in the experiments' files
are generated from this file; `--write` writes them without training. `--ship` writes the trained networks of the
package (see ship.py).
"""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

import common
import ladder_pages
import ship
from cifarnet import cli
from cifarnet.checkpoint import Checkpoint
from cifarnet.config import deciding_settings
from cifarnet.errors import UserError, printable
from cifarnet.records.record import Record
from cifarnet.system import files, hardware
from ladder_pages import Result

RESULTS = common.RESULTS / "ladder.json"
UNTIMED = "untimed"  # an empty file in the folder of a run whose seconds are not recorded
ROOT = Path(__file__).parents[1]
SEEDS = {"speedrun_fast": 5, "speedrun": 5, "baseline": 5, "baseline_muon": 5, "resnet20": 3, "speedrun95": 3}
SEEDS |= {"speedrun96": 1, "resnet18": 1}  # on a CPU, these take hours
LADDER = {
    "cuda": SEEDS | {"speedrun96": 3, "resnet18": 3, "resnet18_long": 1, "wide_resnet": 1, "cct7": 1},
    "cpu": SEEDS,
}
FROM_RECORD = (
    *("parameters", "epochs", "test_accuracy", "test_accuracy_one_view", "tta", "val_accuracy", "seed"),
    *("seconds", "images_per_second", "precision", "git_commit"),
)


def main() -> None:
    parser = common.parser(__doc__, turns=1)
    parser.add_argument("--seeds", type=int, help="runs of each experiment, instead of its usual number")
    parser.add_argument("--untimed", action="store_true", help="do not record seconds: other programs are running")
    parser.add_argument("--write", action="store_true", help="write the tables and the figure without training")
    parser.add_argument("--ship", action="store_true", help="write the trained networks of the package")
    arguments = parser.parse_args()
    results: list[Result] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    names = arguments.only or []  # argparse also puts settings that follow --only into this list
    overrides = [name for name in names if "=" in name] + arguments.overrides
    only = [name for name in names if "=" not in name]
    if arguments.write:
        return write(results)
    if arguments.ship:
        rows, chosen = ladder_pages.shown(ladder_pages.rows_of(current(results))), only or ship.NAMES
        if missing := sorted(set(chosen) - set(rows)):
            sys.exit(f"No results of {', '.join(missing)}: python benchmarks/ladder.py --only {' '.join(missing)}")
        shipped = [rows[name] for name in chosen]
        return ship.ship(ROOT, shipped, [folder_of(row.runs[0]) for row in shipped], overrides)
    failed = train_missing(results, only, overrides, arguments.seeds, timed=not arguments.untimed)
    # only at the end, because the record of a run says whether the checkout has changes
    files.write(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write(results)
    if failed:
        sys.exit(f"These runs failed and are not in the table: {', '.join(failed)}")


def train_missing(
    results: list[Result], only: Sequence[str], overrides: list[str], seeds: int | None = None, timed: bool = True
) -> list[str]:
    """Train the missing runs, add their results to the list, and return the names of the runs that failed."""
    on_cpu = not torch.cuda.is_available() or {"trainer=cpu", "trainer.accelerator=cpu"} & set(overrides)
    device = torch.device("cpu" if on_cpu else "cuda")
    ladder, machine, failed = LADDER[device.type], hardware.describe(device)["name"], []
    if unknown := set(only) - set(ladder):
        sys.exit(f"No {', '.join(sorted(unknown))} on this hardware. Choose from {', '.join(ladder)}.")
    runs = [(seed, name) for name in only or ladder for seed in range(seeds or ladder[name])]
    for seed, name in sorted(runs, key=lambda run: run[0]):  # one seed of all experiments, then the next seed
        settings = [f"+experiment={name}", *overrides]
        shown = [setting for setting in settings if cli.key_of(setting) != "data.root"]
        run = {"command": " ".join(shown), "recipe": recipe(shown), "hardware": machine, "seed": seed}
        for root in set(settings) - set(shown):
            run["images"] = Path(root.partition("=")[2]).name
        if any(run.items() <= result.items() for result in results):
            continue
        folder = folder_of(run)
        if not timed:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / UNTIMED).touch()
        status = train(folder, [*settings, f"seed={seed}"])
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
    return failed


def folder_of(run: Mapping[str, Any]) -> Path:
    """Return the folder of a run, which keeps its checkpoints."""
    command = run["command"].split()
    images = [run["images"]] if "data=folder" in command else []
    label = "_".join([*command, *images, run["recipe"]]).removeprefix("+experiment=")
    return ROOT / "lightning_logs/ladder" / run["hardware"] / label / str(run["seed"])


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
    result = {key: getattr(record, key) for key in FROM_RECORD} | {
        "gflop": gflop(folder),
        "images": root if record.data["source"] == "ImageFolder" else record.data["source"],
        "sha256": record.data["sha256"],
        "hardware": record.hardware["name"],
        "threads": record.hardware["threads"],
        "torch": record.versions["torch"],
        "date": record.finished[:10],
    }
    return result | {"seconds": None, "images_per_second": None} if (folder / UNTIMED).exists() else result


def current(results: Sequence[Result]) -> list[Result]:
    """Return the results of recipes that have not changed since."""
    recipes = {command: recipe(command.split()) for command in {result["command"] for result in results}}
    return [result for result in results if result["recipe"] == recipes[result["command"]]]


def write(results: Sequence[Result]) -> None:
    """Write the pages. Results of recipes that have changed since are kept but not shown."""
    ladder_pages.write(ROOT, current(results))


def gflop(folder: Path) -> float:
    """Return the FLOP of a forward pass of one image: convolutions and matrix products, 2 FLOP per multiply-add."""
    checkpoint = Checkpoint.open(folder)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        checkpoint.network()(torch.zeros(1, 3, checkpoint.image_size, checkpoint.image_size))
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    main()
