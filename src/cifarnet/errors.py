"""Errors that a user can correct: they are reported in one message, without a traceback."""

import re


def printable(text: str) -> str:
    """Return text in which the characters that control a terminal, or the direction of writing, are escaped."""
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(controls, lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """An error that the user can correct. The message names the wrong value and says what to do."""


class NoImages(UserError):
    """The images that a network was trained on are not available."""


class Pruned(Exception):
    """A search has stopped this trial early; the message says after which epoch."""


class Interrupted(BaseException):
    """A signal has stopped a run, after a checkpoint was saved.

    It is not an Exception, as KeyboardInterrupt is not: it ends a whole sweep, not one job.

    Args:
        what: the signal, and when it stopped the run.
        status: the exit status of the process; by convention 128 + the number of the signal.
        command: the command that resumes the run.
    """

    def __init__(self, what: str, status: int, command: str | None = None) -> None:
        super().__init__(what if command is None else f"{what} Resume with:\n  {command}")
        self.what, self.status, self.command = what, status, command

    def __reduce__(self) -> tuple:
        return Interrupted, (self.what, self.status, self.command)  # a job's process sends it to that of the sweep
