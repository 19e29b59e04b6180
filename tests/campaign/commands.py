"""Commands of cifarnet that run in forks of a few processes, and the table of their outcomes."""

import json
import os
import queue
import select
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import cifarnet
from conftest import SMALL

RUN = [*SMALL, "threads=1", "optimizer.lr=0.02", "model.drop_rate=0.2"]  # ten steps in two epochs; S in the output
LIMIT = float(os.environ.get("CAMPAIGN_LIMIT", "60"))  # seconds for one command
PLACES = [str(Path(__file__).parents[1]), str(Path(cifarnet.__file__).parents[1])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PLACES), "OMP_NUM_THREADS": "1"}
Case = TypeVar("Case")


class Worker:
    """A process that runs commands; a new one replaces it when it crashes."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.environment, self.process = folder, ENVIRONMENT | dict(environment or {}), None

    def execute(
        self,
        command: str,
        arguments: Sequence[str],
        probe: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> tuple[int | None, str]:
        """Return the exit status, which is negative for a signal and None for a hang, and the text on stderr."""
        if self.process is None or self.process.poll() is not None:
            worker = [sys.executable, str(Path(__file__).with_name("worker.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            self.process = subprocess.Popen(worker, cwd=self.folder, env=self.environment, **pipes)
            self.process.stdout.readline()
        job = {"command": command, "arguments": list(arguments), "probe": probe, "limit": LIMIT}
        job["folder"] = str(folder or self.folder)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 3 * LIMIT)
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            self.process.kill()
            return self.process.wait(), "the worker crashed"
        reply = json.loads(answer)
        return reply["status"], reply["error"]

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # the process ends
            self.process.wait()

    def run(self, *arguments: Any, **keywords: Any) -> tuple[str, str]:
        """Return the outcome (accepted, clear, unclear, traceback, crash or hang), and the message that was printed."""
        status, error = self.execute(*arguments, **keywords)
        if status is None:
            return "hang", f"more than {LIMIT} s"
        if status < 0:
            return "crash", f"ended with {status}"
        lines = [line for line in error.splitlines() if line.strip()]
        if "Traceback" in error:
            return "traceback", lines[-1]
        if status == 0:
            return "accepted", ""
        clear = status in (1, 2) and any(line.startswith(("Error: ", "usage: ")) for line in lines)
        return ("clear" if clear else "unclear"), " / ".join(lines[-2:])


def shortened(command: Sequence[str]) -> str:
    """Return a command for the shell, in which S stands for the settings `RUN`."""
    different = [argument for argument in command if argument not in RUN]
    return shlex.join(different) + (" S" if len(different) < len(command) else "")


class Tally:
    """The outcomes of a class of inputs; `wrong` lists the commands that went wrong."""

    def __init__(self, name: str) -> None:
        self.name, self.right, self.refused, self.wrong = name, 0, 0, []

    def add(self, problem: str, *commands: Sequence[str]) -> None:
        """Count an input: `problem` is empty if it was handled right, "refused", or a description."""
        if problem in ("", "refused"):
            self.right += problem == ""
            self.refused += problem == "refused"
            return
        shown = " && ".join(f"cifarnet-{shortened(command)}" for command in commands)
        self.wrong.append(f"{self.name}: {problem}\n    {shown}")
        print(self.wrong[-1], flush=True)

    def row(self) -> str:
        figures = self.right + self.refused + len(self.wrong), self.right, self.refused, len(self.wrong)
        return f"| {self.name} | {' | '.join(map(str, figures))} |"


class Pool:
    """As many workers as there are cores, which check the inputs of all tests."""

    def __init__(self) -> None:
        self.workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in os.sched_getaffinity(0):
            self.workers.put(Worker(Path.cwd()))

    def for_each(self, folder: Path, cases: Sequence[Case], check: Callable[[Worker, Case], Any]) -> list[Any]:
        """Check all cases with workers that run in this folder; return the results."""

        def one(case: Case) -> Any:
            worker = self.workers.get()
            worker.folder = folder
            try:
                return check(worker, case)
            finally:
                self.workers.put(worker)

        with ThreadPoolExecutor(self.workers.qsize()) as threads:
            return list(threads.map(one, cases))

    def run(self, folder: Path, command: str, *arguments: str, **keywords: Any) -> tuple[str, str]:
        """Run one command in this folder; return the outcome and the message."""
        return self.for_each(folder, [arguments], lambda worker, case: worker.run(command, case, **keywords))[0]

    def close(self) -> None:
        while not self.workers.empty():
            self.workers.get().close()


def drawn(cases: Sequence[Case], draw: Any) -> list[Case]:
    """Return the cases in random order, at most CAMPAIGN_INPUTS of them."""
    return draw.sample(cases, min(len(cases), int(os.environ.get("CAMPAIGN_INPUTS", len(cases)))))
