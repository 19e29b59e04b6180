"""A process that runs commands of cifarnet one after the other. For each, it reads and writes a line of JSON.

Input: {"command": "train", "arguments": […]}; output: {"status": exit status, "error": the text on stderr}.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback

from hydra.core.global_hydra import GlobalHydra


def run(command: str, arguments: list[str]) -> dict:
    GlobalHydra.instance().clear()
    sys.argv = [f"cifarnet.{command}", *arguments]
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            importlib.import_module(f"cifarnet.{command}").main()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    return {"status": status, "error": error.getvalue()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # commands print elsewhere
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(run(**json.loads(line))) + "\n")
        answers.flush()
