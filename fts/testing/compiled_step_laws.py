"""Laws of compiled steps: they equal eager ones, replay, and are compiled once for each shape."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fts.errors import CompileFallbackWarning
from fts.state import TrainState
from fts.steps import CompiledStep, compile, with_donation
from fts.testing.comparison import clone_tree, fail, law, max_abs, require_close, require_equal
from fts.testing.step_laws import step_summary
from fts.typing import Batch, StepFn

Step = StepFn[TrainState]


def backend() -> str:
    """`inductor` where a C++ compiler is found to build its kernels with, else `aot_eager`.

    >>> backend() in ("inductor", "aot_eager")
    True
    """
    return "inductor" if any(map(shutil.which, ("g++", "clang++", "c++"))) else "aot_eager"


def compiled_equals_eager(step: Step, state: TrainState, batches: Sequence[Batch], *, using: str = "aot_eager") -> None:
    """A step compiled as one graph gives what the eager step gives, to rounding; donated or not, and compiled once.

    Args:
        step: is checked; it must not draw random numbers.
        state: the first state.
        batches: the first is used alone, since each shape costs a graph.
        using: the backend of torch.compile.

    Raises:
        LawError: the step cannot be one graph, gives something else, or is compiled again for the same shapes.
    """
    with law("compiled_equals_eager", step_summary(step)), _whole_graphs():
        plain = with_donation(step, donate=False)
        compiled, in_place = (compile(step, donate=donate, backend=using) for donate in (False, True))
        before = clone_tree(state)
        # twice, because the second step starts from what the first one counted
        for _ in range(2):
            (expected, said), (found, told) = plain(before, batches[0]), compiled(before, batches[0])
            require_close("the compiled state", found, expected, scale=max_abs(expected.params), looser=100)
            require_close("the compiled metrics", told, said, looser=100)
            written, announced = in_place(clone_tree(before), batches[0])
            require_close("the state that was donated to the compiled step", written, found)
            require_close("the metrics of the compiled step with donation", announced, told)
            before = expected
        _require_one_graph(compiled)
        _require_one_graph(in_place)


def compiled_replays(step: Step, state: TrainState, batches: Sequence[Batch], *, using: str = "eager") -> None:
    """A compiled step gives the same bits again, also with dropout, and is compiled once.

    Args:
        step: is checked.
        state: the first state.
        batches: the first is used alone, since each shape costs a graph.
        using: the backend of torch.compile.

    Raises:
        LawError: a replayed step gave something else, or the step was compiled again for the same shapes.
    """
    with law("compiled_replays", step_summary(step)), _whole_graphs():
        compiled = compile(step, donate=False, backend=using)
        before = clone_tree(state)
        for _ in range(2):
            first = compiled(before, batches[0])
            torch.rand(3)
            again = compiled(before, batches[0])
            require_equal("state", again[0], first[0])
            require_equal("metrics", again[1], first[1])
            before = first[0]
        _require_one_graph(compiled)


def _require_one_graph(step: CompiledStep) -> None:
    if step.recompiles:
        fail(f"the step was compiled {step.recompiles} times again for batches of the same shapes; does it count in Python?")


@contextmanager
def _whole_graphs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileFallbackWarning)
        yield
