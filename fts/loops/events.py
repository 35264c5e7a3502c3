"""The events of a run, as frozen values. Two events are equal if their counters and metrics are.

A state in an event is valid until the next step if the loop donates states (the default).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

from fts.loops.cadence import Counters
from fts.typing import Batch, Metrics


@attrs.frozen
class EpochBegin:
    """An epoch begins, or is resumed in the middle."""

    counters: Counters
    state: Any = attrs.field(eq=False, repr=False)


@attrs.frozen
class StepBegin:
    """A batch was fetched; the step runs next."""

    counters: Counters
    state: Any = attrs.field(eq=False, repr=False)
    batch: Batch = attrs.field(eq=False, repr=False)


@attrs.frozen
class StepEnd:
    """An update was applied. `metrics` are tensors on the device: reading them waits for it."""

    counters: Counters
    state: Any = attrs.field(eq=False, repr=False)
    metrics: Metrics = attrs.field(eq=False, repr=False)


@attrs.frozen
class Logged:
    """Metrics were read from the device.

    Attributes:
        counters: the progress of the run.
        metrics: the mean of each scalar metric over the steps since the last log.
        last: the last step's values, for metrics such as the learning rate and the gradient norm.
        steps: the number of steps in the means.
    """

    counters: Counters
    metrics: dict[str, float]
    last: dict[str, float]
    steps: int


@attrs.frozen
class EvalBatch:
    """One batch of an evaluation is done.

    Attributes:
        counters: the progress of training.
        index: the batch's number, from 0.
        batches: how many batches there are; None where the data has no length.
        metrics: what the step returned: (mean, weight) by name, on the device.
    """

    counters: Counters
    index: int
    batches: int | None
    metrics: Mapping[str, Any] = attrs.field(eq=False, repr=False)


@attrs.frozen
class Evaluated:
    """An evaluation is complete."""

    counters: Counters
    metrics: dict[str, float]


@attrs.frozen
class Saved:
    """A checkpoint was saved as `path`; an `AsyncCheckpointer` may still be writing it."""

    counters: Counters
    path: Path


@attrs.frozen
class RolledBack:
    """A step failed, and the run continues from an earlier state, after the batch that failed.

    Attributes:
        counters: the progress of the run; `counters.position` is where in the data it continues.
        step: the step of the state that it continues from.
        error: of the step that failed.
    """

    counters: Counters
    step: int
    error: Exception = attrs.field(eq=False)


@attrs.frozen
class EpochEnd:
    """An epoch ended.

    Attributes:
        counters: the progress of the run.
        state: the current state.
        complete: False where the run, or the epoch, was ended before the end of the data.
    """

    counters: Counters
    state: Any = attrs.field(eq=False, repr=False)
    complete: bool = True


@attrs.frozen
class Stopped:
    """The run is over; always the last event.

    Attributes:
        counters: the progress of the run; `counters.position` is where to resume.
        state: the final state.
        reason: "total_steps", "epochs", or "due" if `due` stopped it.
    """

    counters: Counters
    state: Any = attrs.field(eq=False, repr=False)
    reason: Literal["total_steps", "epochs", "due"] = "total_steps"


Event: TypeAlias = EpochBegin | StepBegin | StepEnd | Logged | EvalBatch | Evaluated | Saved | RolledBack | EpochEnd | Stopped
