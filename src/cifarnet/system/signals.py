"""Handlers of signals that are installed for a while."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from cifarnet.errors import Interrupted


@contextlib.contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Install a handler of signals, and restore the previous handlers at the end. Only the main thread may do so."""
    previous = {number: signal.signal(number, handler) for number in numbers}
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
