"""Where in the order of the data a run is."""

from __future__ import annotations

import attrs


@attrs.frozen(order=True)
class Position:
    """The place of the next batch: everything before it was consumed.

    Attributes:
        epoch: which pass over the data, from 0.
        batch: how many of the steps' batches were consumed in that epoch. Its length means "consumed to the end".

    >>> Position(epoch=1) > Position(epoch=0, batch=7)
    True
    """

    epoch: int = 0
    batch: int = 0
