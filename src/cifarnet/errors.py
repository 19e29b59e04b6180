"""What a user can put right is told in one message, without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message names the value that is wrong and what to do about it."""


class Pruned(Exception):
    """A search has given this trial up; the message says after which epoch."""


class Interrupted(BaseException):
    """Training was asked to stop by a signal and did, after saving a checkpoint.

    No Exception, as KeyboardInterrupt is none: it ends a whole sweep, not one job.

    Attributes:
        status: the exit status by convention, 128 + the signal's number.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple:
        return Interrupted, (str(self), self.status)  # from a sweep's process to the one that started it
