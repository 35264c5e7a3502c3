"""Laws of compiled steps: they equal eager steps, can be replayed, and are compiled once for each shape."""

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


def available_backend() -> str:
    """`inductor` if a C++ compiler is found, else `aot_eager`.

    >>> available_backend() in ("inductor", "aot_eager")
    True
    """
    return "inductor" if any(map(shutil.which, ("g++", "clang++", "c++"))) else "aot_eager"


def compiled_equals_eager(step: Step, state: TrainState, batches: Sequence[Batch], *, backend: str = "aot_eager") -> None:
    """A step compiled as one graph equals the eager step, to rounding, with and without donation, and is compiled once.

    Args:
        step: to check; it must not draw random numbers.
        state: the initial state.
        batches: only the first is used, since each shape is compiled.
        backend: of torch.compile.

    Raises:
        LawError: the step cannot be one graph, has other results, or is compiled again for the same shapes.
    """
    with law("compiled_equals_eager", step_summary(step)), _no_fallback():
        plain = with_donation(step, donate=False)
        compiled, in_place = (compile(step, donate=donate, backend=backend) for donate in (False, True))
        before = clone_tree(state)
        # twice, because the second step has other counters
        for _ in range(2):
            (expected, expected_metrics), (found, metrics) = plain(before, batches[0]), compiled(before, batches[0])
            require_close("the compiled state", found, expected, scale=max_abs(expected.params), tolerance_factor=100)
            require_close("the compiled metrics", metrics, expected_metrics, tolerance_factor=100)
            donated, donated_metrics = in_place(clone_tree(before), batches[0])
            require_close("the state that was donated to the compiled step", donated, found)
            require_close("the metrics of the compiled step with donation", donated_metrics, metrics)
            before = expected
        _require_one_graph(compiled)
        _require_one_graph(in_place)


def compiled_replays(step: Step, state: TrainState, batches: Sequence[Batch], *, backend: str = "eager") -> None:
    """A replayed compiled step gives the same bits, also with dropout, and is compiled once.

    Args:
        step: to check.
        state: the initial state.
        batches: only the first is used, since each shape is compiled.
        backend: of torch.compile.

    Raises:
        LawError: a replayed step had other results, or the step was compiled again for the same shapes.
    """
    with law("compiled_replays", step_summary(step)), _no_fallback():
        compiled = compile(step, donate=False, backend=backend)
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
def _no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileFallbackWarning)
        yield
