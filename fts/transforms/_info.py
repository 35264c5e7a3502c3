"""Infos of several transforms in one flat dictionary, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from fts.typing import Info


def merged(infos: Sequence[Info]) -> Info:
    """All entries; the second `lr` becomes `lr_2`."""
    result: Info = {}
    for info in infos:
        for key, value in info.items():
            name, nth = key, 1
            while name in result:
                nth += 1
                name = f"{key}_{nth}"
            result[name] = value
    return result


def merged_by_name(infos: Mapping[str, Info]) -> Info:
    """All entries; a key that several have becomes `key/name`."""
    keys = [key for info in infos.values() for key in info]
    return {
        key if keys.count(key) == 1 else f"{key}/{name}": value for name, info in infos.items() for key, value in info.items()
    }


def info_of(info: Info, name: str, names: Iterable[str]) -> Info:
    """What `name` can have contributed to the result of `merged_by_name`, under its own keys."""
    others = tuple(f"/{other}" for other in names if other != name)
    return {key.removesuffix(f"/{name}"): value for key, value in info.items() if not key.endswith(others)}


def values_of(info: Info, key: str) -> Iterator[tuple[str, Tensor]]:
    """The entries of `info` that were reported as `key`, whatever merging made of it."""
    for name, value in info.items():
        head = name.split("/")[0]
        if head == key or (head.startswith(f"{key}_") and head[len(key) + 1 :].isdigit()):
            yield name, value
