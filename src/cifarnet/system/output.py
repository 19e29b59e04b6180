"""The standard output and error of a command, which a user may close while it runs."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from cifarnet.errors import UserError


class Output:
    """A stream that discards what is written after its reader has ended (`| head -1`, or a closed terminal)."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ± in an ASCII terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, output: Callable[..., Any], *arguments: str) -> None:
        try:
            output(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # for the buffered text, too
            if error.errno not in (errno.EPIPE, errno.EIO):
                problem = f"The output cannot be written: {error.strerror}."
                raise UserError(f"{problem} Free disk space, or redirect it elsewhere.") from error


@contextlib.contextmanager
def optional_output() -> Iterator[None]:
    """Complete a command although its output or error stream is closed, now (`>&-`) or later. Characters that the
    encoding of the output lacks are escaped."""
    out, error = (Output(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            out.flush()
            error.flush()
