"""A process that runs commands of cifarnet, each in a fork of its own.

It writes a line when it is ready. Then it reads and writes a line of JSON for each command.

Input: {"command": "train", "arguments": […], "probe": null, "folder": "…", "limit": 60}; output: {"status": exit
status, negative for a signal, null for a hang, "error": the text on stderr}. The modules that a command has imported
are imported here too, so that the next command starts at once.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import time
import traceback
from typing import IO, Any

import cifarnet


def run(command: str, arguments: list[str], probe: dict[str, Any] | None, folder: str) -> int:
    """Run a command in this process and return its exit status."""
    os.chdir(folder)
    sys.argv = [f"cifarnet.{command}", *arguments]
    try:
        if probe:
            from campaign.probes import install

            install(**probe)
        importlib.import_module(f"cifarnet.{command}").main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(limit: float, modules: IO[str], errors: IO[str], **job: Any) -> int | None:
    """Run a command in a fork and return its exit status, or None after `limit` seconds."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(errors.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            status = run(**job)
            json.dump([*sys.modules], modules)
            modules.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def answer(limit: float, **job: Any) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as modules, tempfile.TemporaryFile("w+", errors="replace") as errors:
        status = fork(limit, modules, errors, **job)
        for file in (modules, errors):
            file.seek(0)
        for name in json.loads(modules.read() or "[]") if status == 0 else []:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return {"status": status, "error": errors.read()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # commands print elsewhere
    for module in pkgutil.walk_packages(cifarnet.__path__, "cifarnet."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        answers.write(json.dumps(answer(**json.loads(line))) + "\n")
        answers.flush()
