"""Handlers of signals that are installed for a while."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from cifarnet.errors import Interrupted

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name)]


def can_install() -> bool:
    """Whether this thread may install handlers; Python allows it only in the main thread."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Install a handler of signals, and restore the previous handlers at the end; in another thread, do nothing."""
    previous = {number: signal.signal(number, handler) for number in numbers if can_install()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interrupting(numbers: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Raise `Interrupted` on these signals."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"Stopped by {signal.Signals(number).name}.", 128 + number)

    return handled(numbers, interrupt)
