"""Notes on errors: at which step, batch and examples they happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from fts.loops.cadence import Counters
from fts.loops.events import Event, Saved, StepBegin
from fts.loops.position import Position
from fts.loops.source import Source
from fts.messages import abbreviate

MAX_LISTED = 64
"""A note lists at most so many examples of a batch."""


def with_error_context(events: Iterator[Event], data: Any = None) -> Iterator[Event]:
    """The same events; an error that ends them gets a note with the step, epoch, batch and the examples of that batch.

    Args:
        events: those of `fit`.
        data: the `source` that they run over, to list the examples where they have indices.

    Returns:
        An iterator of events.

    >>> from fts import loops
    >>> def step(state, batch):
    ...     return state + 1 // batch, {}
    >>> try:
    ...     list(with_error_context(loops.fit(step, 0, [1, 2, 0])))
    ... except ZeroDivisionError as error:
    ...     print(error.__notes__[0])
    In step 3: epoch 0, batch 2 (from 0).
    """
    counters, in_step = Counters(), False
    try:
        for event in events:
            if not isinstance(event, Saved):
                counters = event.counters
            in_step = isinstance(event, StepBegin)
            yield event
    except Exception as error:
        if in_step:
            error.add_note(f"In step {counters.step + 1}: {describe_batch(data, counters.position)}.")
        else:
            error.add_note(f"After step {counters.step}, before {describe_batch(data, counters.position)}.")
        raise


def describe_batch(data: Any, position: Position) -> str:
    """The batch at a position, and its examples, in words.

    >>> from fts import loops
    >>> describe_batch(loops.source(list(range(6)), batch_size=3), Position(0, 1))
    'epoch 0, batch 1 (from 0), examples 3, 4, 5 of the data'
    """
    text = f"epoch {position.epoch}, batch {position.batch} (from 0)"
    examples = data.example_indices(*attrs.astuple(position)) if isinstance(data, Source) else None
    return f"{text}, examples {abbreviate(examples, MAX_LISTED)} of the data" if examples else text
