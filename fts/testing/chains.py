"""Laws of `chain`: it is associative, and `identity` changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fts import transforms as tx
from fts.testing.comparison import clone_tree, law, require_equal, transform_summary
from fts.typing import Params, Transform


def chain_is_associative(
    first: Transform,
    second: Transform,
    third: Transform,
    params: Params,
    gradients: Sequence[Params],
    *,
    chain: Callable[..., Transform] = tx.chain,
) -> None:
    """Chains of three transforms have the same updates, states, infos and fast paths for every bracketing.

    Args:
        first: the first transform.
        second: the second.
        third: the third.
        params: the parameters.
        gradients: of successive updates.
        chain: the function that composes transforms.

    Raises:
        LawError: two bracketings differ.
    """
    bracketings = {
        "chain(chain(a, b), c)": chain(chain(first, second), third),
        "chain(a, chain(b, c))": chain(first, chain(second, third)),
        "chain(identity(), a, b, c)": chain(tx.identity(), first, second, third),
    }
    plain = chain(first, second, third)
    with law("chain_is_associative", transform_summary(plain)):
        for expression, other in bracketings.items():
            state = plain.init(params)
            require_equal(f"the state of {expression}", other.init(params), state)
            for grads in gradients:
                expected, found = plain.update(grads, state, params), other.update(grads, state, params)
                for what, one, two in zip(("updates", "state", "info"), found, expected, strict=True):
                    require_equal(f"the {what} of {expression}", one, two)
                if plain.apply is not None and other.apply is not None:
                    fast_expected = plain.apply(clone_tree(grads), clone_tree(state), clone_tree(params))
                    fast_found = other.apply(clone_tree(grads), clone_tree(state), clone_tree(params))
                    for what, one, two in zip(("params", "state", "info"), fast_found, fast_expected, strict=True):
                        require_equal(f"the {what} of {expression} by apply", one, two)
                state = expected[1]


def chaining_is_associative(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """A transform in a chain between two others, one of them with momentum, obeys `chain_is_associative`.

    Args:
        transform: to check.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: two bracketings differ.
    """
    chain_is_associative(tx.trace(0.9), transform, tx.scale(0.5), params, gradients)
