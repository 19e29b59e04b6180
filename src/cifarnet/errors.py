"""What a user can put right is told in one message, without a traceback."""

import re


def printable(text: str) -> str:
    """Text with the characters that command a terminal, or turn the direction of writing, as `\\x1b`."""
    commands = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(commands, lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """Something the user can mend: the message names the value that is wrong and what to do about it."""


class NoImages(UserError):
    """Those that a network was trained on are not here."""


class Pruned(Exception):
    """A search has given this trial up; the message says after which epoch."""


class Interrupted(BaseException):
    """Training was asked to stop by a signal and did, after saving a checkpoint.

    No Exception, as KeyboardInterrupt is none: it ends a whole sweep, not one job.

    Attributes:
        what: stopped it, and when.
        status: the exit status by convention, 128 + the signal's number.
    """

    def __init__(self, what: str, status: int, command: str | None = None) -> None:
        """`command` goes on with it."""
        super().__init__(what if command is None else f"{what} Go on with:\n  {command}")
        self.what, self.status, self.command = what, status, command

    def __reduce__(self) -> tuple:
        return Interrupted, (self.what, self.status, self.command)  # from a sweep's process to the one that started it
