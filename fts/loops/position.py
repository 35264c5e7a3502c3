"""The position of a run in the order of the data."""

from __future__ import annotations

import attrs


@attrs.frozen(order=True)
class Position:
    """The position of the next batch: all batches before it were consumed.

    Attributes:
        epoch: from 0.
        batch: how many of the steps' batches were consumed in that epoch; at the end of the epoch, its length.

    >>> Position(epoch=1) > Position(epoch=0, batch=7)
    True
    """

    epoch: int = 0
    batch: int = 0
