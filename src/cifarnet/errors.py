"""Errors that a user can correct, which are reported in one message without a traceback."""

import contextlib
import re
from collections.abc import Iterator


def printable(text: str) -> str:
    """Escape the characters that control a terminal or the direction of text."""
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(controls, lambda found: found[0].encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """Escape control characters and line breaks."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def csv_cell(value: object) -> object:
    """Put an apostrophe before a text that spreadsheets would evaluate as a formula.

    See https://owasp.org/www-community/attacks/CSV_Injection. Numbers are not changed."""
    if not str(value).startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    with contextlib.suppress(ValueError):
        float(str(value))
        return value
    return f"'{value}"


class UserError(Exception):
    """An error that the user can correct. The message states the wrong value and what to do."""


class NoImages(UserError):
    """The images of the network's data set are not available."""


class Diverged(UserError):
    """The loss or the weights of a run are no longer finite. The message states the epoch and what to try."""


class MachineFault(UserError):
    """A process of a run on several devices was killed, or had too little memory or disk space."""


class TakenOver(Exception):
    """Another process runs this trial of a search, because this process was suspended or disconnected."""


class Pruned(Exception):
    """A search stopped this trial early; the message states the epoch."""


class Interrupted(BaseException):
    """A signal stopped a run after a checkpoint was saved.

    Like KeyboardInterrupt, it is not an Exception, so that it ends a whole sweep and not only one job.

    Args:
        what: a sentence with the signal and the time at which it stopped the run.
        status: the exit status of the process; by convention 128 + the number of the signal.
        command: the command that resumes the run.
    """

    def __init__(self, what: str, status: int, command: str | None = None) -> None:
        super().__init__(what if command is None else f"{what} Resume with:\n  {command}")
        self.what, self.status, self.command = what, status, command

    def __reduce__(self) -> tuple:
        return Interrupted, (self.what, self.status, self.command)  # a job's process sends it to the sweep's process


def reason(error: BaseException) -> str:
    """Return the message of an error on one line, without a period at its end; its type if it has no message."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and the errors that caused it. An error that is raised again can be among its own causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__  # inner: torch.compile


@contextlib.contextmanager
def as_user_error(part: str) -> Iterator[None]:
    """Report the errors that networks, optimizers, schedules and losses raise for invalid settings."""
    try:
        yield
    except ArithmeticError as error:  # the warm-up has fewer than two steps
        raise UserError(f"{part}: {error}. Train longer, or choose scheduler=linear or scheduler=constant.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{part}: {reason(error)}. Change its settings.") from error
