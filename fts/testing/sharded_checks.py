"""The check of transforms on sharded tensors, in several processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fts.errors import ArgumentError
from fts.testing import strategies
from fts.testing.process_pool import process_pool
from fts.testing.sharded import SHARDING_LAYOUTS, sharded_equals_full
from fts.testing.transform_checks import run_examples
from fts.typing import Params, Transform


def check_sharded_transform(
    make_transform: Callable[[], Transform],
    *,
    processes: int = 2,
    params: SearchStrategy[Params] | Params | None = None,
    steps: int = 2,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    layouts: Collection[str] = tuple(SHARDING_LAYOUTS),
) -> None:
    """Check that a transform gives the same results on sharded tensors as on full ones.

    The processes are started once; Hypothesis's active profile sets the number of examples.

    Args:
        make_transform: makes the transform in each process: a function at the top of a module, or `functools.partial` of one.
        processes: the world size, an even number.
        params: parameters, or a strategy for them, for a transform that needs certain names or shapes; None generates any.
        steps: the maximum number of successive updates.
        dtypes: of generated parameters.
        layouts: how tensors are sharded: names of `fts.testing.sharded.SHARDING_LAYOUTS`.

    Raises:
        LawError: the law is broken. The message names the transform, the layout, the parameter and both values.
        ArgumentError: the function cannot be pickled, or an argument is out of range.

    >>> import functools
    >>> from fts import transforms as tx
    >>> check_sharded_transform(functools.partial(tx.clip_by_global_norm, 1.0))  # doctest: +SKIP
    """
    if processes < 2 or processes % 2:
        raise ArgumentError(f"check_sharded_transform: processes must be an even number, not {processes!r}.")
    tree = (
        strategies.params(dtypes=dtypes) if params is None else st.just(dict(params)) if isinstance(params, Mapping) else params
    )
    examples = st.tuples(strategies.trajectories(tree, length=steps), st.sampled_from(sorted(layouts)))
    with process_pool(processes) as run:

        def check(example: Any) -> None:
            trajectory, layout = example
            run(_check_law, make_transform, *trajectory, layout)

        run_examples(check, examples)


def _check_law(make_transform: Callable[[], Transform], params: Params, gradients: list[Params], layout: str) -> None:
    sharded_equals_full(make_transform(), params, gradients, layout=layout)
