"""Commands of cifarnet that run one after the other in one process."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import cifarnet

LIMIT = 60  # seconds for one command
PLACES = [str(Path(__file__).parents[1]), str(Path(cifarnet.__file__).parents[1])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PLACES), "OMP_NUM_THREADS": "1"}


class Worker:
    """A process that runs commands; a new one replaces it when a command crashes or hangs."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.environment, self.process = folder, ENVIRONMENT | dict(environment or {}), None

    def run(self, command: str, arguments: list[str]) -> tuple[str, str]:
        """Return the outcome, and the message that was printed."""
        if self.process is None:
            worker = [sys.executable, str(Path(__file__).with_name("worker.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            self.process = subprocess.Popen(worker, cwd=self.folder, env=self.environment, **pipes)
        self.process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            self.process.kill()
            code, self.process = self.process.wait(), None
            return ("crash", f"ended with {code}") if ready else ("hang", f"more than {LIMIT} s")
        reply = json.loads(answer)
        lines = [line for line in reply["error"].splitlines() if line.strip()]
        if "Traceback" in reply["error"]:
            return "traceback", lines[-1]
        if reply["status"] == 0:
            return "accepted", ""
        clear = reply["status"] in (1, 2) and any(line.startswith(("Error: ", "usage: ")) for line in lines)
        return ("clear" if clear else "unclear"), " / ".join(lines[-2:])
