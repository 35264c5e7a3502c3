"""Laws of compiled steps: they equal eager ones, replay, and are compiled once."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fts.errors import CompileFallbackWarning
from fts.state import TrainState
from fts.steps import compile, donating
from fts.testing.comparing import copy_of, fail, law, require_close, require_equal, size_of
from fts.testing.step_laws import run, words_of
from fts.typing import Batch, StepFn

Step = StepFn[TrainState]


def backend() -> str:
    """`inductor` where a C++ compiler is found to build its kernels with, else `aot_eager`.

    >>> backend() in ("inductor", "aot_eager")
    True
    """
    return "inductor" if any(map(shutil.which, ("g++", "clang++", "c++"))) else "aot_eager"


def compiled_equals_eager(step: Step, state: TrainState, batches: Sequence[Batch], *, using: str = "aot_eager") -> None:
    """A step compiled as one graph gives the states and metrics of the eager step, to rounding; donated or not.

    Args:
        step: is checked; it must not draw random numbers.
        state: the first state.
        batches: the first is used alone, since each shape costs a graph.
        using: the backend of torch.compile.

    Raises:
        LawError: the step cannot be one graph, or gives something else.
    """
    with law("compiled_equals_eager", words_of(step)), _whole_graphs():
        plain = donating(step, donate=False)
        compiled = compile(step, donate=False, backend=using)
        before = copy_of(state)
        # one shape, because each costs a graph; twice, because the second step starts from what the first one counted
        for batch in (batches[0], batches[0]):
            (expected, said), (found, told) = plain(before, batch), compiled(before, batch)
            in_place, announced = donating(compiled)(copy_of(before), batch)
            require_close("the compiled state", found, expected, scale=size_of(expected.params), looser=100)
            require_close("the compiled metrics", told, said, looser=100)
            require_close("the state that was donated to the compiled step", in_place, found, looser=1e-3)
            require_close("the metrics of the compiled step with donation", announced, told, looser=1e-3)
            before = expected


def compiled_once(step: Step, state: TrainState, batches: Sequence[Batch], *, using: str = "eager") -> None:
    """Later batches of the same shapes are served by the graph that was made for the first.

    Args:
        step: is checked.
        state: the first state.
        batches: the first is used alone, since each shape costs a graph.
        using: the backend of torch.compile.

    Raises:
        LawError: the step was compiled again.
    """
    import torch._dynamo

    with law("compiled_once", words_of(step)), _whole_graphs():
        compiled = compile(step, donate=True, backend=using)
        before, _ = run(compiled, copy_of(state), batches[:1])
        counters = torch._dynamo.utils.counters["stats"]
        made = counters["unique_graphs"]
        run(compiled, before, [batches[0]] * 3)
        if counters["unique_graphs"] != made:
            fail(f"the step was compiled {counters['unique_graphs'] - made} times again for batches of the same shapes")


def compiled_replays(step: Step, state: TrainState, batches: Sequence[Batch], *, using: str = "eager") -> None:
    """A compiled step gives the same bits again, also with dropout.

    Args:
        step: is checked.
        state: the first state.
        batches: the first is used alone, since each shape costs a graph.
        using: the backend of torch.compile.

    Raises:
        LawError: a replayed step gave something else.
    """
    import torch

    with law("compiled_replays", words_of(step)), _whole_graphs():
        compiled = compile(step, donate=False, backend=using)
        before = copy_of(state)
        for _ in range(2):
            first = compiled(before, batches[0])
            torch.rand(3)
            again = compiled(before, batches[0])
            require_equal("state", again[0], first[0])
            require_equal("metrics", again[1], first[1])
            before = first[0]


@contextmanager
def _whole_graphs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileFallbackWarning)
        yield
