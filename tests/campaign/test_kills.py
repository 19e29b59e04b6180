"""After kills at random moments, resumed runs equal uninterrupted ones.

python -m pytest -m campaign tests/campaign -s
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from campaign.commands import ENVIRONMENT
from conftest import SMALL, assert_same_weights

pytestmark = [pytest.mark.campaign, pytest.mark.skipif(sys.platform != "linux", reason="Linux's signals and folders")]
RECIPE = [*SMALL, "data.train_size=600", "trainer.max_epochs=25", "model.drop_rate=0.2", "optimizer.lr=0.02"]
SEEDS = [f"seed={seed}" for seed in range(3)]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]
EARLIEST, LATEST = 4, 14  # seconds after which a process is killed


def start(folder: Path, command: list[str]) -> subprocess.Popen:
    program = [sys.executable, "-m", *command]
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=folder, env=ENVIRONMENT, start_new_session=True, **pipe)


def reference(folder: Path, command: list[str]) -> None:
    process = start(folder, command)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def survive(folder: Path, command: Callable[[], list[str]], kills: int, seed: int) -> None:
    """Start a process, kill it and start it again; after `kills` kills, it runs to its end."""
    draw = random.Random(seed)
    killed = 0
    while True:
        process = start(folder, command())
        try:
            _, error = process.communicate(timeout=draw.uniform(EARLIEST, LATEST) if killed < kills else 300)
        except subprocess.TimeoutExpired:
            number = draw.choice(SIGNALS)
            process.send_signal(number)  # only to the process that was started
            _, error = process.communicate(timeout=60)
            killed += 1
            assert "Traceback" not in error, error
            time.sleep(0.5)
            assert workers(process.pid) == [], "a worker outlived its sweep"
            continue
        assert process.returncode == 0, error
        if killed >= kills:
            print(f"{killed} kills survived (seed {seed})")
            return
        killed += 1  # it has ended before the kill: repeat the command


def workers(group: int) -> list[str]:
    """Return the processes of a group that still run."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listed.splitlines())
    return [" ".join(row) for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(one / "checkpoints" / name, other / "checkpoints" / name)
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, other))
    for key in ("history", "val_accuracy", "test_accuracy", "tested_epoch"):
        assert first[key] == second[key], key


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Uninterrupted runs of three seeds: jobs 0, 1 and 2 of a sweep."""
    folder = tmp_path_factory.mktemp("whole")
    reference(folder, ["cifarnet.train", "-m", *RECIPE, "seed=0,1,2", "hydra.sweep.dir=sweep"])
    return folder / "sweep"


@pytest.mark.parametrize("disk", ["", "/dev/shm"], ids=["same disk", "another disk"])
def test_a_run_survives_kills(whole, tmp_path, disk):
    run = Path(disk, f"cifarnet-campaign-{os.getpid()}") if disk else tmp_path / "run"

    def command() -> list[str]:
        if (run / "checkpoints/last.ckpt").exists():
            return ["cifarnet.train", f"ckpt_path={run}"]
        return ["cifarnet.train", *RECIPE, f"hydra.run.dir={run}"]

    before = set(os.listdir("/tmp"))
    try:
        survive(tmp_path, command, 10, seed=int(os.environ.get("CAMPAIGN_SEED", "0")))
        assert_same_run(whole / "0", run)
        assert sorted(os.listdir(run / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    finally:
        if disk:
            subprocess.run(["rm", "-r", str(run)], check=True)
    left = [name for name in set(os.listdir("/tmp")) - before if os.path.getsize(f"/tmp/{name}") > 50_000]
    assert left == []


@pytest.mark.parametrize("launcher", ["basic", "parallel"])
def test_a_sweep_survives_kills(whole, tmp_path, launcher):
    def command() -> list[str]:
        if (tmp_path / "sweep/multirun.yaml").exists():
            return ["cifarnet.train", "sweep.resume=sweep"]
        parallel = [f"hydra/launcher={launcher}"] if launcher == "parallel" else []
        return ["cifarnet.train", "-m", *RECIPE, *parallel, "seed=0,1,2", "hydra.sweep.dir=sweep"]

    survive(tmp_path, command, 10, seed=int(os.environ.get("CAMPAIGN_SEED", "0")) + 1)
    for job in "012":
        assert_same_run(whole / job, tmp_path / "sweep" / job)


@pytest.mark.parametrize("storage", ["null", "sqlite:///studies.db"])
def test_a_search_survives_kills(whole, tmp_path, storage):
    search = ["cifarnet.search", *RECIPE, "seed=0,1,2", "hydra.sweeper.trials=4"]
    search += ["hydra.sweeper.pruner=null", "hydra.sweep.dir=search", f"hydra.sweeper.storage={storage}"]
    survive(tmp_path, lambda: search, 10, seed=int(os.environ.get("CAMPAIGN_SEED", "0")) + 2)
    trials = sorted(path for path in (tmp_path / "search").iterdir() if path.name.isdigit())
    assert len(trials) == 4
    for trial in trials:
        assert not (trial / "error.txt").exists(), (trial / "error.txt").read_text()
        seed = json.loads((trial / "metrics.json").read_text())["seed"]
        assert_same_run(whole / str(seed), trial)
