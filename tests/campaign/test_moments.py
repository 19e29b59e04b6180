"""Runs that are stopped at any kind of moment equal uninterrupted ones after they are resumed.

python -m pytest -m campaign tests/campaign/test_moments.py -s
"""

import json
import os
import signal
import time

import pytest

from campaign.commands import RUN, Worker, drawn
from campaign.stops import stop_and_resume

pytestmark = pytest.mark.campaign
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL]
KINDS = {
    "plain": [],
    "window 2": ["+trainer.accumulate_grad_batches=2"],
    "window 3": ["+trainer.accumulate_grad_batches=3", "+recipe=[ema,mixup]"],
    "validation within epochs": ["+trainer.val_check_interval=2", "data.hardest_share=0.7"],
    "average of weights": ["+recipe=swa", "recipe.swa.epoch=1", "scheduler=constant", "module.tta=mirror"],
    "adam": ["optimizer=adamw", "+recipe=lookahead"],
}
MOST = 60  # of each kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_at_any_moment_equals_an_uninterrupted_one(tmp_path, pool, tally, draw, kind):
    settings = [*RUN, *KINDS[kind]]
    assert pool.run(tmp_path, "train", *settings, "hydra.run.dir=first") == ("accepted", "")
    start = time.monotonic()
    probe = {"counts": str(tmp_path / "counts.json")}
    assert pool.run(tmp_path, "train", *settings, "hydra.run.dir=whole", probe=probe) == ("accepted", "")
    seconds = time.monotonic() - start
    calls = json.loads((tmp_path / "counts.json").read_text())
    moments = [{"moment": name, "count": count} for name in calls for count in {1, calls[name] // 2 + 1, calls[name]}]
    moments += [{"after": draw.uniform(0, seconds)} for _ in range(len(moments) // 4)]
    cases = [{"number": int(number), **moment} for moment in moments for number in SIGNALS]
    cases = drawn(cases, draw)[: int(os.environ.get("CAMPAIGN_INPUTS", MOST))]
    outcomes = tally(f"stops: {kind}")

    def check(worker: Worker, case: tuple[int, dict]) -> None:
        number, probe = case
        problem, commands = stop_and_resume(worker, settings, tmp_path / "whole", f"run{number}", probe)
        outcomes.add(problem, *commands)

    pool.for_each(tmp_path, list(enumerate(cases)), check)
    assert outcomes.wrong == []
