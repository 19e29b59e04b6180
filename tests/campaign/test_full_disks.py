"""Disks that fill up at random moments cause one message and no loss. python -m pytest -m campaign tests/campaign -s"""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaign.commands import Worker
from cifarnet.checkpoint import Checkpoint
from conftest import SMALL, assert_same_weights, picture

pytestmark = pytest.mark.campaign
RECIPE = [*SMALL, "trainer.max_epochs=4", "optimizer.lr=0.02"]
KILOBYTES = 40, 1500  # a run needs about 1,100


@contextlib.contextmanager
def disk(place: Path, kilobytes: int) -> Iterator[None]:
    """Mount a disk of this size."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def make_room(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Worker:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a disk of a chosen size needs root on Linux")
    worker = Worker(tmp_path_factory.mktemp("disks"))
    assert worker.run("train", [*RECIPE, "hydra.run.dir=whole"]) == ("accepted", "")
    return worker


@pytest.mark.parametrize("turn", range(12))
def test_a_run_that_fills_a_disk_can_be_resumed(worker, turn):
    draw = random.Random(f"{os.environ.get('CAMPAIGN_SEED', '0')} {turn}")
    place, size = worker.folder / f"disk{turn}", draw.randrange(*KILOBYTES)
    run, last = f"hydra.run.dir={place}/run", place / "run/checkpoints/last.ckpt"
    with disk(place, size):
        outcome, message = worker.run("train", [*RECIPE, run])
        print(f"{size} kB: {outcome} {message}")
        assert outcome in ("clear", "accepted")
        if outcome == "clear":
            assert "No space left" in message
        assert not list(place.rglob(".*.tmp"))
        make_room(place)
        for file in place.rglob("*.ckpt"):
            Checkpoint.open(file)  # complete
        resume = [f"ckpt_path={last}"] if last.exists() else [*RECIPE, run]
        assert worker.run("train", resume) == ("accepted", "")
        assert_same_weights(worker.folder / "whole/checkpoints/last.ckpt", last)


@pytest.mark.parametrize("turn", range(4))
def test_a_sweep_that_fills_a_disk_can_be_resumed(worker, turn):
    draw = random.Random(f"{os.environ.get('CAMPAIGN_SEED', '0')} sweep {turn}")
    place = worker.folder / f"disk-sweep{turn}"
    with disk(place, draw.randrange(KILOBYTES[0], 2 * KILOBYTES[1])):
        outcome, message = worker.run("train", ["-m", *RECIPE, "seed=0,1", f"hydra.sweep.dir={place}/sweep"])
        print(f"{outcome} {message}")
        assert outcome in ("clear", "accepted")
        make_room(place)
        assert worker.run("train", [f"sweep.resume={place}/sweep"]) == ("accepted", "")
        assert_same_weights(worker.folder / "whole/checkpoints/last.ckpt", place / "sweep/0/checkpoints/last.ckpt")


@pytest.mark.parametrize("kilobytes", [20, 60, 200, 500])
def test_an_evaluation_that_fills_a_disk_can_be_repeated(worker, kilobytes):
    place = worker.folder / f"disk-evaluation{kilobytes}"
    evaluation = ["whole", "corruptions=false", f"output_dir={place}/evaluation"]
    with disk(place, kilobytes):
        outcome, message = worker.run("evaluate", evaluation)
        assert (outcome, "No space left" in message) == ("clear", True)
        assert not list(place.rglob(".*.tmp"))
        make_room(place)
        assert worker.run("evaluate", evaluation) == ("accepted", "")


def test_a_cache_that_fills_a_disk_is_not_kept(worker):
    place, tree = worker.folder / "disk-cache", worker.folder / "tree"
    for split in ("train", "test"):
        for name in "ab":
            for image in range(40):
                picture(tree / split / name / f"{image}.png", (image, 9, 9))
    fresh = Worker(worker.folder, {"CIFARNET_CACHE": str(place)})
    folder = [*RECIPE[5:], "trainer=cpu", "data=folder", f"data.root={tree}", "data.batch_size=8"]
    with disk(place, 100):
        assert fresh.run("train", [*folder, "hydra.run.dir=cached"])[0] == "accepted"
        assert os.listdir(place) == []
