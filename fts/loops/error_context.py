"""Where in a run, and in its data, an error happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from fts.loops.cadence import Counters
from fts.loops.events import Event, Saved, StepBegin
from fts.loops.position import Position
from fts.loops.source import Source
from fts.messages import abbreviate

SHOWN = 64
"""So many items of a batch a note lists."""


def with_error_context(events: Iterator[Event], data: Any = None) -> Iterator[Event]:
    """The same events; an error that ends them says in a note at which step, epoch and batch, and which items that batch has.

    Args:
        events: those of `fit`.
        data: the `source` that they run over, to tell the items where they have numbers.

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
    counters, inside = Counters(), False
    try:
        for event in events:
            if not isinstance(event, Saved):
                counters = event.counters
            inside = isinstance(event, StepBegin)
            yield event
    except Exception as error:
        if inside:
            error.add_note(f"In step {counters.step + 1}: {describe_batch(data, counters.position)}.")
        else:
            error.add_note(f"After step {counters.step}, before {describe_batch(data, counters.position)}.")
        raise


def describe_batch(data: Any, position: Position) -> str:
    """Say which batch is at a position, and of which items it is made.

    >>> from fts import loops
    >>> describe_batch(loops.source(list(range(6)), batch_size=3), Position(0, 1))
    'epoch 0, batch 1 (from 0), items 3, 4, 5 of the data'
    """
    text = f"epoch {position.epoch}, batch {position.batch} (from 0)"
    items = data.items(*attrs.astuple(position)) if isinstance(data, Source) else None
    return f"{text}, items {abbreviate(items, SHOWN)} of the data" if items else text
