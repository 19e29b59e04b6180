"""Hundreds of bad inputs: each is told in one line, or works. python -m pytest -m campaign tests/campaign -s"""

import collections
import json
import os
import random
import select
import subprocess
import sys
from pathlib import Path

import pytest

import cifarnet
from campaign.inputs import MUST, SMALL, TRAIN, all_inputs

pytestmark = pytest.mark.campaign
LIMIT = 60  # seconds for one input


class Worker:
    """A process that runs commands, and is made anew when one crashes or hangs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None

    def run(self, command: str, arguments: list[str]) -> tuple[str, str]:
        """The outcome, and what was told."""
        if self.process is None:
            places = Path(__file__).parents[1], Path(cifarnet.__file__).parents[1]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
            worker = [sys.executable, str(Path(__file__).with_name("worker.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            self.process = subprocess.Popen(worker, cwd=self.folder, env=environment, **pipes)
        self.process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            self.process.kill()
            code, self.process = self.process.wait(), None
            return ("crash", f"ended with {code}") if ready else ("hang", f"more than {LIMIT} s")
        told = json.loads(answer)
        lines = [line for line in told["error"].splitlines() if line.strip()]
        if "Traceback" in told["error"]:
            return "traceback", lines[-1]
        if told["status"] == 0:
            return "accepted", ""
        clear = told["status"] in (1, 2) and any(line.startswith(("Error: ", "usage: ")) for line in lines)
        return ("clear" if clear else "unclear"), " / ".join(lines[-2:])


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
        outcome, told = worker.run(command, arguments)
        if (tmp_path / "exploded").exists():
            outcome = "exploded"
        if outcome == "accepted" and kind in MUST:
            outcome = "wrongly accepted"
        outcomes[outcome] += 1
        if outcome not in ("clear", "accepted"):
            wrong.append(f"{outcome}: {command} {' '.join(a for a in arguments if a not in TRAIN)}: {told}")
            print(wrong[-1], flush=True)
    print(f"\n{len(inputs)} inputs (seed {seed}): {dict(outcomes)}")
    assert wrong == []
