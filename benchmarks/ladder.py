"""The ladder: for each budget of time the best recipe known, each with its seeds, its seconds and its command.

    python benchmarks/ladder.py [--seeds 3] [--only resnet20 baseline] [data=folder data.root=…]

Trains what is missing for this hardware, one run after the other, and goes on where it was killed. Of each finished
run's record a few lines are kept in results/ladder.json; from these alone come the table in docs/zoo.md and its
picture. `--write` writes both and trains nothing.
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
from cifarnet import checkpoint, cli
from cifarnet.config import deciding_settings
from cifarnet.records.figures import save
from cifarnet.system import files, hardware

KEPT = common.RESULTS / "ladder.json"
ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs/zoo.md", ROOT / "docs/images/ladder.png"
BEGIN, END = "<!-- written by benchmarks/ladder.py -->", "<!-- to here -->"

SHORT = ["speedrun_fast", "speedrun", "baseline", "baseline_muon"]
LONG = ["speedrun95", "speedrun96", "resnet20", "resnet18", "resnet18_long", "wide_resnet", "cct7"]
LADDER = {  # experiments, and what they are given beside; on a processor those that end within an hour
    "cuda": dict.fromkeys(SHORT + LONG, ""),
    "cpu": dict.fromkeys(SHORT, "") | {"resnet20": "trainer.max_epochs=30"},
}

Run = dict[str, Any]  # what is kept of one


def main() -> None:
    parser = common.parser(__doc__, turns=1)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each experiment")
    parser.add_argument("--write", action="store_true", help="write table and picture, train nothing")
    arguments = parser.parse_args()
    kept: list[Run] = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else []
    named = arguments.only or []  # argparse counts settings that follow among them
    overrides = [one for one in named if "=" in one] + arguments.overrides
    only = [one for one in named if "=" not in one]
    failed = [] if arguments.write else climb(kept, only, arguments.seeds, overrides)
    write(kept)
    if failed:
        sys.exit(f"Failed, and not in the table: {', '.join(failed)}")


def climb(kept: list[Run], only: list[str] | None, seeds: int, overrides: list[str]) -> list[str]:
    """Train what is missing, keeping each run as it ends. Returns what failed."""
    on_cpu = not torch.cuda.is_available() or {"trainer=cpu", "trainer.accelerator=cpu"} & set(overrides)
    device = torch.device("cpu" if on_cpu else "cuda")
    ladder, machine, failed = LADDER[device.type], hardware.describe(device)["name"], []
    if unknown := set(only or ()) - set(ladder):
        sys.exit(f"No {', '.join(sorted(unknown))} on this hardware. There are: {', '.join(ladder)}")
    for seed in range(seeds):  # all experiments once, then again
        for name in only or ladder:
            settings = [*ladder[name].split(), *overrides]
            shown = [f"+experiment={name}", *(one for one in settings if cli.key_of(one) != "data.root")]
            same = {"command": " ".join(shown), "recipe": recipe(shown), "hardware": machine, "seed": seed}
            if any(same.items() <= run.items() for run in kept):
                continue
            label = "_".join([*shown, same["recipe"]]).removeprefix("+experiment=")
            folder = ROOT / "lightning_logs/ladder" / machine / label / str(seed)
            status = train(folder, [f"+experiment={name}", *settings, f"seed={seed}"])
            if status in (130, 143):  # stopped, and saved
                sys.exit(f"The same command goes on: python {' '.join(sys.argv)}")
            if status:
                failed.append(f"{name} with seed {seed}")
                continue
            kept.append(same | boiled_down(folder))
            files.write(KEPT, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
            write(kept)
    return failed


def recipe(settings: Sequence[str]) -> str:
    """What these settings stand for now, as a checksum: an experiment that is changed is another one."""
    config = OmegaConf.to_container(cli.compose("train", [*settings, "output_dir=run"]), resolve=False)
    written = json.dumps(deciding_settings(config, times=True), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:8]


def train(folder: Path, settings: list[str]) -> int:
    """Until the folder holds a finished run, from where it was cut off if it was; the exit status."""
    if (folder / "metrics.json").is_file():
        return 0
    if (folder / "checkpoints/last.ckpt").is_file():
        settings = [f"ckpt_path={cli.literal(str(folder))}"]
    else:
        settings = [*settings, f"hydra.run.dir={cli.literal(str(folder))}"]
    run = subprocess.Popen([sys.executable, "-m", "cifarnet.train", *settings])
    # it saves and ends: a terminal tells it of Ctrl-C too, of which subprocess.run would kill it 0.25 s later
    before = signal.signal(signal.SIGINT, lambda *_: None), signal.signal(signal.SIGTERM, lambda *_: run.terminate())
    try:
        return run.wait()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def boiled_down(folder: Path) -> Run:
    """Of a finished run's record, what the table shows."""
    record = json.loads((folder / "metrics.json").read_text("utf-8"))
    data, machine = record["data"], record["hardware"]
    folder_of_images = Path(record["resolved"]["data"].get("root", "")).name
    images = folder_of_images if data["source"] == "ImageFolder" else data["source"]
    same = ("parameters", "epochs", "test_accuracy", "test_accuracy_one_view", "tta", "val_accuracy", "seed")
    same += ("seconds", "images_per_second", "precision", "git_commit")
    return {key: record[key] for key in same} | {
        **{"gflop": gflop(folder), "images": images, "sha256": data["sha256"]},
        **{"hardware": machine["name"], "threads": machine["threads"], "torch": record["versions"]["torch"]},
        "date": record["finished"][:10],
    }


def gflop(folder: Path) -> float:
    """Of a look at one image: convolutions and matrix products, a multiply-add counted as two."""
    path = checkpoint.find(folder)
    content = checkpoint.read(path)
    network, _ = checkpoint.network(content, path)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, 3, *2 * [content["hyper_parameters"]["image_size"]]))
    return counter.get_total_flops() / 1e9


def write(kept: list[Run]) -> None:
    """Table and picture of what is kept, a row for each command on each hardware and data.

    What was trained by a recipe that has been changed since stays kept, and is not shown.
    """
    rows, now = defaultdict(list), {command: recipe(command.split()) for command in {run["command"] for run in kept}}
    for run in sorted(kept, key=lambda run: run["seed"]):
        if run["recipe"] != now[run["command"]]:
            continue
        where = f"{run['hardware']}, {run['threads']} threads, {run['precision']}, torch {run['torch']}"
        rows[where, run["images"], run["sha256"], run["command"]].append(run)
    rows = dict(sorted(rows.items(), key=lambda row: (row[0][:3], mean(row[1], "seconds"))))
    columns = ("`python -m cifarnet.train …`", "parameters", "GFLOP an image", "epochs", "test accuracy", "seconds")
    columns += ("images/s", "images", "hardware", "commit, date")
    lines = [" | ".join(("", *columns, "")).strip(), "| --- |" + " ---: |" * 6 + " --- | --- | --- |"]
    for (where, images, _, command), runs in rows.items():
        commits = dict.fromkeys(f"{commit(run)}, {run['date']}" for run in runs)
        cells = [f"`{command}`", f"{runs[0]['parameters']:,}", f"{runs[0]['gflop']:.3g}", str(runs[0]["epochs"])]
        cells += [accuracy(runs), f"{mean(runs, 'seconds'):,.0f}", f"{mean(runs, 'images_per_second'):,.0f}"]
        lines.append(f"| {' | '.join([*cells, images, where, '; '.join(commits)])} |")
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    files.write(PAGE, "\n".join([before + BEGIN, "", *lines, "", END + after]))
    save(picture(rows), PICTURE)


def commit(run: Run) -> str:
    name, dirty, _ = (run["git_commit"] or "unknown").partition("-dirty")
    return name[:7] + dirty


def mean(runs: list[Run], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def accuracy(runs: list[Run]) -> str:
    """Mean ± standard deviation (number of runs), in percent."""

    def of(key: str) -> str:
        return common.mean_and_deviation([run[key] for run in runs])

    one_view = f"; {of('test_accuracy_one_view')} without {runs[0]['tta']}" if runs[0]["tta"] != "none" else ""
    return f"{of('test_accuracy')} % ({len(runs)}{one_view})"


def picture(rows: dict[tuple[str, ...], list[Run]]) -> Figure:
    """Test accuracy against seconds of training, a colour for each hardware and data."""
    axis = Figure(figsize=(8, 4.5), dpi=120, layout="constrained").subplots()
    for place in dict.fromkeys(row[:2] for row in rows):
        here = {row[3]: runs for row, runs in rows.items() if row[:2] == place}
        seconds = [mean(runs, "seconds") for runs in here.values()]
        values = [[100 * run["test_accuracy"] for run in runs] for runs in here.values()]
        spread = [statistics.stdev(of) if len(of) > 1 else 0 for of in values]
        style = {"fmt": "o", "capsize": 3, "label": f"{place[1]}, {place[0]}"}
        axis.errorbar(seconds, [statistics.mean(of) for of in values], spread, **style)
        for command, x, of in zip(here, seconds, values, strict=True):
            name = command.split()[0].removeprefix("+experiment=")
            axis.annotate(name, (x, statistics.mean(of)), xytext=(6, -12), textcoords="offset points")
    axis.set(xlabel="seconds of training", ylabel="test accuracy, %", xscale="log", title="Accuracy against seconds")
    axis.margins(x=0.2, y=0.15)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if rows:
        axis.legend(frameon=False, loc="lower right", fontsize="small")
    return axis.figure


if __name__ == "__main__":
    main()
