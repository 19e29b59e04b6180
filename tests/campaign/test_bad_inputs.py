"""Hundreds of bad inputs are reported in one line, or accepted. python -m pytest -m campaign tests/campaign -s"""

import contextlib
import os
import threading

import pytest

from campaign.commands import Worker, drawn
from campaign.inputs import REFUSED, SMALL, TRAIN, Input, all_inputs

pytestmark = pytest.mark.campaign


def test_bad_inputs(tmp_path, pool, tally, draw):
    assert pool.run(tmp_path, "train", *TRAIN[:-1], "hydra.run.dir=good") == ("accepted", "")
    sweep = ["-m", *SMALL, "trainer.max_epochs=1", "scheduler=constant", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert pool.run(tmp_path, "train", *sweep) == ("accepted", "")
    inputs = list(all_inputs(tmp_path / "good", tmp_path, int(os.environ.get("CAMPAIGN_SEED", "0"))))
    tallies = {kind: tally(f"bad inputs: {kind}") for kind in dict.fromkeys(kind for kind, *_ in inputs)}
    lock = threading.Lock()

    def check(worker: Worker, case: tuple[int, Input]) -> None:
        number, (kind, command, arguments) = case
        is_run = TRAIN[-1] in arguments
        own = [f"hydra.run.dir=run{number}" if argument == TRAIN[-1] else argument for argument in arguments]
        with contextlib.nullcontext() if is_run else lock:  # other commands write to the same folders
            outcome, message = worker.run(command, own)
        problem = {"accepted": "", "clear": "refused"}.get(outcome, f"{outcome}: {message}")
        if (tmp_path / "exploded").exists():
            problem = "code of a file has run"
        elif outcome == "accepted" and kind in REFUSED:
            problem = "wrongly accepted"
        tallies[kind].add(problem, [command, *own])

    pool.for_each(tmp_path, list(enumerate(drawn(inputs, draw))), check)
    assert [problem for one in tallies.values() for problem in one.wrong] == []
