"""The check of all laws of a transform, on generated examples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from hypothesis import HealthCheck, Phase, example as explicit_example, given, settings, strategies as st
from hypothesis.strategies import SearchStrategy

from fts.errors import ArgumentError
from fts.testing import strategies
from fts.testing.chains import chaining_is_associative
from fts.testing.fast_paths import apply_equals_update, update_in_place_equals_update
from fts.testing.purity import inputs_unchanged, same_inputs_same_outputs, state_owns_its_memory
from fts.testing.structure import info_is_flat, state_is_tensors, state_round_trips, structure_is_stable
from fts.testing.torch_func import differentiable, vmapped_equals_loop
from fts.testing.tracing import traced_equals_eager, traced_once
from fts.typing import Params, Transform

TransformLaw: TypeAlias = Callable[[Transform, Params, Sequence[Params]], None]

# the laws whose messages are the most specific come first
FAST_LAWS: tuple[TransformLaw, ...] = (
    state_is_tensors,
    info_is_flat,
    structure_is_stable,
    same_inputs_same_outputs,
    inputs_unchanged,
    state_owns_its_memory,
    apply_equals_update,
    update_in_place_equals_update,
)
MEDIUM_LAWS: tuple[TransformLaw, ...] = (state_round_trips, vmapped_equals_loop, differentiable, chaining_is_associative)
SLOW_LAWS: tuple[TransformLaw, ...] = (traced_equals_eager, traced_once)

TRANSFORM_LAWS: dict[str, TransformLaw] = {law.__name__: law for law in (*FAST_LAWS, *MEDIUM_LAWS, *SLOW_LAWS)}
"""Every law of a transform, `law(transform, params, gradients)`, by name."""

_EXAMPLES_DIVISOR = {FAST_LAWS: 1, MEDIUM_LAWS: 4, SLOW_LAWS: 40}
"""By group of laws: the number of examples in Hypothesis's profile for one that the group gets."""


def check_transform(
    transform: Transform,
    *,
    params: SearchStrategy[Params] | Params | None = None,
    steps: int = 3,
    dtypes: Sequence[torch.dtype] = strategies.DTYPES,
    nonfinite: bool = False,
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Check every law of a transform on generated parameters and gradients.

    Hypothesis's active profile sets the number of examples; laws that compile get a fortieth of them.

    Args:
        transform: to check.
        params: parameters, or a strategy for them, for a transform that needs certain names or shapes; None generates any.
        steps: the maximum number of successive updates.
        dtypes: of generated parameters.
        nonfinite: also generate gradients with NaN and infinities, on which the fast paths must agree.
        laws: check only these; the names are those of `TRANSFORM_LAWS`.
        skip: do not check these.

    Raises:
        LawError: a law is broken. The message names it, the transform, the parameter and both values.
        ArgumentError: `transform` is not a Transform, or there is no law of a given name.

    >>> from fts import transforms as tx
    >>> check_transform(tx.scale(-0.1), laws=["info_is_flat", "inputs_unchanged"])
    """
    if not isinstance(transform, Transform):
        raise ArgumentError(
            f"check_transform needs a Transform, not {type(transform).__name__}. Did you forget to call the function that "
            "makes one, as in `sgd(0.1)`?"
        )
    chosen = select_laws(TRANSFORM_LAWS, laws, skip)
    if params is None:
        tree = strategies.params(dtypes=dtypes)
        fixed = [strategies.fixed_trajectory(dtype, length=steps) for dtype in dtypes]
    else:
        tree = st.just(dict(params)) if isinstance(params, Mapping) else params
        fixed = []
    examples = strategies.trajectories(tree, length=steps, nonfinite=nonfinite)
    for group, divisor in _EXAMPLES_DIVISOR.items():
        selected = [law for law in group if law.__name__ in chosen]
        if selected:
            slow = group is SLOW_LAWS
            run_examples(
                _check_all(transform, selected),
                examples,
                divisor=divisor,
                explicit=fixed if group is FAST_LAWS else fixed[:1],
                shrink=not slow,
            )


def select_laws(all_laws: Mapping[str, Any], laws: Collection[str] | None, skip: Collection[str]) -> set[str]:
    """The names of the selected laws, after a check that they exist.

    >>> sorted(select_laws({"a": 1, "b": 2, "c": 3}, None, ["b"]))
    ['a', 'c']
    """
    for name in (*(laws or ()), *skip):
        if name not in all_laws:
            raise ArgumentError(f"There is no law {name!r}; there are {', '.join(all_laws)}.")
    return set(all_laws if laws is None else laws) - set(skip)


def run_examples(
    check: Callable[[Any], None],
    examples: SearchStrategy[Any],
    *,
    divisor: int = 1,
    explicit: Sequence[Any] = (),
    shrink: bool = True,
) -> None:
    """Run a check on examples under Hypothesis's active profile, without its deadlines.

    Args:
        check: raises if an example breaks a law.
        examples: a strategy.
        divisor: divides the profile's number of examples.
        explicit: examples that run before the generated ones, and alone if `divisor` leaves none of these.
        shrink: search a smaller example after a failure.
    """
    current = settings()
    only_explicit = bool(explicit) and current.max_examples < divisor
    skipped = (
        {Phase.explain} | (set() if shrink else {Phase.shrink}) | ({Phase.generate, Phase.reuse} if only_explicit else set())
    )

    @settings(
        current,
        max_examples=max(1, current.max_examples // divisor),
        deadline=None,  # the first call of an operator is slow
        report_multiple_bugs=False,  # one law at a time
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in current.phases if phase not in skipped],
    )
    @given(examples)
    def run(example: Any) -> None:
        check(example)

    for each in reversed(explicit):
        run = explicit_example(each)(run)
    run()


def _check_all(transform: Transform, laws: Sequence[TransformLaw]) -> Callable[[strategies.Trajectory], None]:
    def check(example: strategies.Trajectory) -> None:
        for law in laws:
            law(transform, example.params, example.gradients)

    return check
