"""The check of all laws of a step, on given or generated batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeAlias

from hypothesis.strategies import SearchStrategy

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.testing.compiled_step_laws import compiled_equals_eager, compiled_replays
from fts.testing.step_laws import (
    accumulated_equals_big_batch,
    donated_equals_pure,
    engines_agree,
    metrics_are_flat,
    module_unchanged,
    replayed_equals_first,
    resumed_equals_uninterrupted,
    state_advances,
    step_inputs_unchanged,
)
from fts.testing.transform_checks import run_examples, select_laws
from fts.typing import Batch, StepFn

StepLaw: TypeAlias = Callable[[StepFn[TrainState], TrainState, Sequence[Batch]], None]

FAST_LAWS: tuple[StepLaw, ...] = (
    metrics_are_flat,
    state_advances,
    step_inputs_unchanged,
    module_unchanged,
    replayed_equals_first,
    donated_equals_pure,
    engines_agree,
    accumulated_equals_big_batch,
    resumed_equals_uninterrupted,
)
SLOW_LAWS: tuple[StepLaw, ...] = (compiled_equals_eager, compiled_replays)

STEP_LAWS: dict[str, StepLaw] = {law.__name__: law for law in (*FAST_LAWS, *SLOW_LAWS)}
"""Every law of a step, `law(step, state, batches)`, by name."""

_EXAMPLES_DIVISOR = {FAST_LAWS: 4, SLOW_LAWS: 20}
"""By group of laws: the number of examples in Hypothesis's profile for one that the group gets."""


def check_step(
    step: StepFn[TrainState],
    state: TrainState,
    batches: Sequence[Batch] | SearchStrategy[Sequence[Batch]],
    *,
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Check every law of a step.

    Args:
        step: from `train_step`, or any function `(state, batch) -> (state, metrics)`. Laws of engines, donation and
            accumulation are checked for the first kind only, since a function has no such options.
        state: the initial state; it is not consumed.
        batches: of successive steps, at least one; or a strategy for such sequences. Of the examples of Hypothesis's active
            profile laws get a quarter, those that compile a twentieth.
        laws: check only these; the names are those of `STEP_LAWS`.
        skip: do not check these: `accumulated_equals_big_batch` and `engines_agree` if examples of a batch depend on each
            other (BatchNorm) or on random numbers (dropout), `compiled_equals_eager` for random numbers.

    Raises:
        LawError: a law is broken. The message names it, the step, the parameter and both values.
        ArgumentError: there is no law of a given name, or no batch.

    >>> import torch
    >>> from fts import steps, transforms as tx
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(0.1))
    >>> step = steps.train_step(lambda params, batch: (params["w"] - batch).square().mean(), tx.sgd(0.1))
    >>> check_step(step, state, [torch.tensor([1.0, 2.0])], skip=["compiled_equals_eager", "compiled_replays"])
    """
    if not callable(step):
        raise ArgumentError(f"check_step needs a step (state, batch) -> (state, metrics), not {type(step).__name__}.")
    chosen = select_laws(STEP_LAWS, laws, skip)
    for group, divisor in _EXAMPLES_DIVISOR.items():
        selected = [law for law in group if law.__name__ in chosen]
        if not isinstance(batches, SearchStrategy):
            _check_all(selected, step, state, batches)
        elif selected:
            run_examples(partial(_check_all, selected, step, state), batches, divisor=divisor, shrink=group is not SLOW_LAWS)


def _check_all(laws: Sequence[StepLaw], step: StepFn[TrainState], state: TrainState, batches: Sequence[Batch]) -> None:
    if not batches:
        raise ArgumentError("check_step needs at least one batch.")
    for law in laws:
        law(step, state, batches)
