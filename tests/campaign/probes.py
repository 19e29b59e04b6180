"""What the campaign does inside a command: it sends signals at chosen moments, and records figures."""

import inspect
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from cifarnet.callbacks.history import History

HOOKS = sorted(
    name for name, _ in inspect.getmembers(Callback, inspect.isfunction) if name[:3] in ("on_", "set", "tea")
)


def install(
    number: int = 0, moment: str = "", count: int = 0, after: float = 0, counts: str = "", rates: str = ""
) -> None:
    """Send this process a signal at a moment, and record figures in files.

    Args:
        number: the signal; 0: none.
        moment: a hook of Lightning's callbacks, or a function of `os` that writes a file, such as "os.replace".
        count: the call, counted from 1, before which the signal is sent.
        after: the seconds after which the signal is sent, instead of at a moment.
        counts: the file for the number of calls of each moment.
        rates: the file for the learning rate of each step of the optimizer.
    """
    calls = Counter()

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls[name] += 1
            if (name, calls[name]) == (moment, count):
                os.kill(os.getpid(), number)
            if counts and os.path.isdir(os.path.dirname(counts)):
                with open(counts, "w") as file:
                    json.dump(calls, file)
            if rates and name == "on_before_optimizer_step":
                with open(rates, "a") as file:
                    print(*(group["lr"] for group in arguments[3].param_groups), file=file)
            return function(*arguments, **keywords)

        return call

    for name in HOOKS:
        setattr(History, name, watched(name, getattr(History, name)))
    for name in ("replace", "fsync"):
        setattr(os, name, watched(f"os.{name}", getattr(os, name)))
    if after:
        timer = threading.Timer(after, os.kill, [os.getpid(), number])
        timer.daemon = True
        timer.start()
