"""Every exception that fts raises on purpose.

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
    """A batch cannot be used: a key is missing, it is empty, or its rows cannot be split."""


class LossError(FtsError, ValueError):
    """A loss function returned something that is not a scalar loss (with weight and metrics)."""


class ScheduleError(FtsError, ValueError):
    """A schedule is misconfigured or returned a value that no training can use."""


class NonFiniteError(FtsError, FloatingPointError):
    """A loss or gradient is NaN or infinite, or was so for longer than allowed."""


class SpikeError(FtsError, ArithmeticError):
    """Norms of gradients stayed far above what they had been for longer than allowed."""


class DonatedStateError(FtsError, RuntimeError):
    """A state was used after a step had reused its storage."""


class DataError(FtsError, ValueError):
    """A dataset or loader cannot be used as asked, for example because it is empty."""


class WorkerError(FtsError, RuntimeError):
    """A process that reads the data was killed, or left."""


class CheckpointError(FtsError, RuntimeError):
    """A checkpoint is missing, damaged, or does not fit the state it is loaded into."""


class DistributedError(FtsError, RuntimeError):
    """Processes that train together do not fit together, or one of them is gone."""


class MissingDependencyError(FtsError, ImportError):
    """An optional package or a piece of hardware is needed and absent."""


class HubError(FtsError, RuntimeError):
    """The Hugging Face Hub could not be reached, or refused what was asked; nothing on the disk is lost.

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
    """A run was stopped by a signal, after it had saved what it was asked to save. Left alone, it ends the process.

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
