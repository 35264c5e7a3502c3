"""The exceptions that fts raises.

Each says what was wrong, with the value, and what to do. All derive from `FtsError`, and also from the
built-in exception that a caller would expect, so `except ValueError` keeps working.
"""


class FtsError(Exception):
    """Base of all errors raised by fts."""


class ArgumentError(FtsError, ValueError):
    """An argument has a value that cannot work."""


class UnknownParameterError(FtsError, KeyError):
    """A name (in a mask, a label, a state) matches no parameter."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class BatchError(FtsError, ValueError):
    """A batch cannot be used: a key is missing, it is empty, or it cannot be split into micro-batches."""


class LossError(FtsError, ValueError):
    """A loss function returned something that is not a scalar loss (with weight and metrics)."""


class ScheduleError(FtsError, ValueError):
    """A schedule is misconfigured or returned an invalid value."""


class NonFiniteError(FtsError, FloatingPointError):
    """A loss or gradient is NaN or infinite, or was so for longer than allowed."""


class SpikeError(FtsError, ArithmeticError):
    """Gradient norms stayed far above their usual level for longer than allowed."""


class DonatedStateError(FtsError, RuntimeError):
    """A state was used after a step had reused its storage."""


class DataError(FtsError, ValueError):
    """A dataset or loader cannot be used as asked, for example because it is empty."""


class WorkerError(FtsError, RuntimeError):
    """A data worker process was killed, or exited."""


class CheckpointError(FtsError, RuntimeError):
    """A checkpoint is missing, corrupt, or does not fit the state it is loaded into."""


class DistributedError(FtsError, RuntimeError):
    """The ranks of a group do not fit each other, or one of them is gone."""


class MissingDependencyError(FtsError, ImportError):
    """An optional package or a hardware device is required, but missing."""


class HubError(FtsError, RuntimeError):
    """The Hugging Face Hub could not be reached, or refused a request; nothing on the disk is lost.

    Attributes:
        refused: whether it is so at each try, for example because the token is wrong.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class CallbackError(FtsError, RuntimeError):
    """A callback raised; the original exception is the cause."""


class CompileFallbackWarning(UserWarning):
    """A step could not be compiled as one graph and runs eagerly instead."""


class Interrupted(SystemExit):
    """A signal stopped a run, after its checkpoint was saved. If it is not caught, the process exits.

    It is no `FtsError`: nothing that catches errors should catch it.

    Attributes:
        code: the exit status, 128 + the signal's number: 143 for SIGTERM.
        reason: the signal's name.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason} stopped the run (exit status {self.code})."


class KeyboardInterrupted(Interrupted, KeyboardInterrupt):
    """As `Interrupted`, by Ctrl-C: code that catches KeyboardInterrupt catches it."""
