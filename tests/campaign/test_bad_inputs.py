"""Hundreds of bad inputs are reported in one line, or accepted. python -m pytest -m campaign tests/campaign -s"""

import collections
import os
import random

import pytest

from campaign.commands import Worker
from campaign.inputs import REFUSED, SMALL, TRAIN, all_inputs

pytestmark = pytest.mark.campaign


def test_bad_inputs(tmp_path):
    seed = int(os.environ.get("CAMPAIGN_SEED", "0"))
    worker = Worker(tmp_path)
    assert worker.run("train", [*TRAIN[:-1], "hydra.run.dir=good"]) == ("accepted", "")
    sweep = ["-m", *SMALL, "trainer.max_epochs=1", "scheduler=constant", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert worker.run("train", sweep) == ("accepted", "")
    outcomes, wrong = collections.Counter(), []
    inputs = list(all_inputs(tmp_path / "good", tmp_path, seed))
    random.Random(seed).shuffle(inputs)
    for kind, command, arguments in inputs[: int(os.environ.get("CAMPAIGN_INPUTS", len(inputs)))]:
        outcome, message = worker.run(command, arguments)
        if (tmp_path / "exploded").exists():
            outcome = "exploded"
        if outcome == "accepted" and kind in REFUSED:
            outcome = "wrongly accepted"
        outcomes[outcome] += 1
        if outcome not in ("clear", "accepted"):
            specific = " ".join(argument for argument in arguments if argument not in TRAIN)
            wrong.append(f"{outcome}: {command} {specific}: {message}")
            print(wrong[-1], flush=True)
    print(f"\n{len(inputs)} inputs (seed {seed}): {dict(outcomes)}")
    assert wrong == []
