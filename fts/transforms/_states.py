"""The states of single transforms within the state of a composed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fts.typing import OptState


def states_in(tree: OptState, *kinds: type) -> list[Any]:
    """The states of these kinds in an optimizer's state, in their order."""
    if isinstance(tree, kinds):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [state for child in children for state in states_in(child, *kinds)]


def with_states(tree: OptState, changes: Mapping[type, Callable[[Any], OptState]]) -> OptState:
    """An optimizer's state in which each state of a kind is exchanged for what that kind's function makes of it.

    >>> with_states((1, {"a": [2]}), {int: lambda number: 10 * number})
    (10, {'a': [20]})
    """
    new: Any = tree
    if isinstance(tree, dict):
        new = {key: with_states(child, changes) for key, child in tree.items()}
    elif isinstance(tree, (tuple, list)):
        children = [with_states(child, changes) for child in tree]
        make: Any = type(tree)
        new = make(*children) if hasattr(tree, "_fields") else make(children)
    change = changes.get(type(tree))
    return new if change is None else change(new)
