"""All laws of a transform, on generated examples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from hypothesis import HealthCheck, Phase, example as explicit, given, settings, strategies as st
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

# those that say most about a mistake come first
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

_SHARES = {FAST_LAWS: 1, MEDIUM_LAWS: 4, SLOW_LAWS: 40}
"""One in how many of the profile's examples a group of laws gets."""


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

    Hypothesis's active profile says how many examples there are; laws that compile get a fortieth of them.

    Args:
        transform: is checked.
        params: parameters, or a strategy of them, for a transform that knows names or shapes; None generates any.
        steps: the largest number of successive updates.
        dtypes: of generated parameters.
        nonfinite: generate gradients with NaN and infinities, too; the fast paths must then agree on them.
        laws: check these alone; the names are those of `TRANSFORM_LAWS`.
        skip: leave these out.

    Raises:
        LawError: a law does not hold. The message names it, the transform, the parameter and both values.
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
        always = [strategies.fixed_trajectory(dtype, length=steps) for dtype in dtypes]
    else:
        tree = st.just(dict(params)) if isinstance(params, Mapping) else params
        always = []
    examples = strategies.trajectories(tree, length=steps, nonfinite=nonfinite)
    for group, share in _SHARES.items():
        wanted = [law for law in group if law.__name__ in chosen]
        if wanted:
            slow = group is SLOW_LAWS
            run_examples(
                _all_of(transform, wanted),
                examples,
                share=share,
                always=always if group is FAST_LAWS else always[:1],
                shrink=not slow,
            )


def select_laws(all_laws: Mapping[str, Any], laws: Collection[str] | None, skip: Collection[str]) -> set[str]:
    """The names that are asked for, checked against those that there are.

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
    share: int = 1,
    always: Sequence[Any] = (),
    shrink: bool = True,
) -> None:
    """Run a check on examples under Hypothesis's active profile, without its limits on time.

    Args:
        check: raises where an example breaks a law.
        examples: a strategy.
        share: one in how many of the profile's examples to take.
        always: examples that come before the generated ones, and alone where the profile leaves no share for others.
        shrink: look for a smaller example after a failure.
    """
    current = settings()
    few = bool(always) and current.max_examples < share
    unwanted = {Phase.explain} | (set() if shrink else {Phase.shrink}) | ({Phase.generate, Phase.reuse} if few else set())

    @settings(
        current,
        max_examples=max(1, current.max_examples // share),
        deadline=None,  # the first call of an operator is slow
        report_multiple_bugs=False,  # one law at a time
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in current.phases if phase not in unwanted],
    )
    @given(examples)
    def run(example: Any) -> None:
        check(example)

    for each in reversed(always):
        run = explicit(each)(run)
    run()


def _all_of(transform: Transform, laws: Sequence[TransformLaw]) -> Callable[[strategies.Trajectory], None]:
    def check(example: strategies.Trajectory) -> None:
        for law in laws:
            law(transform, example.params, example.gradients)

    return check
