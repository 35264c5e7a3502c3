"""Outputs of models as trees: tensors in tuples, lists and dictionaries."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

LEAF_TYPES = (Tensor, np.ndarray, np.generic)


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with each tensor or array replaced; what is neither is left out of dictionaries, and None elsewhere.

    This is not optree, for which subclasses of dictionaries, such as transformers' outputs, are leaves.

    >>> tree_map(len, (np.zeros(2), {"a": [np.zeros(3)], "b": "text"}))
    (2, {'a': [3]})
    """
    if isinstance(tree, LEAF_TYPES):
        return fn(tree)
    if isinstance(tree, Mapping):
        mapped = {key: tree_map(fn, value) for key, value in tree.items()}
        values = {key: value for key, value in mapped.items() if value is not None}
        return type(tree)(values) if isinstance(tree, (OrderedDict, UserDict)) else values
    if isinstance(tree, (list, tuple)):
        parts = [tree_map(fn, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else (parts if isinstance(tree, list) else tuple(parts))
    return None


def tree_leaves_with_path(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each tensor or array with its path.

    >>> [path for path, _ in tree_leaves_with_path((np.zeros(2), {"a": [np.zeros(3)], "b": "text"}))]
    ['[0]', '[1].a[0]']
    """
    if isinstance(tree, LEAF_TYPES):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tree_leaves_with_path(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, part in enumerate(tree):
            yield from tree_leaves_with_path(part, f"{path}[{index}]")
