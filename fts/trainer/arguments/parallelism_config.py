"""`parallelism_config`, and its environment variables from `accelerate launch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments.checks import check_known_names
from fts.trainer.arguments.parsing import TRUE_VALUES

MESH_DIMENSIONS = {
    "dp_replicate_size": "replicate",
    "dp_shard_size": "shard",
    "cp_size": "context",
    "sp_size": "sequence",
    "tp_size": "tensor",
}
"""Attribute of accelerate's ParallelismConfig -> dimension of the mesh."""


def parse_parallelism_config(name: str, value: Any) -> Any:
    """The value of `parallelism_config` to store: accelerate's ParallelismConfig, also from a dictionary; None stays.

    >>> parse_parallelism_config("parallelism_config", {"tp_size": 2}).tp_size
    2
    """
    if isinstance(value, dict):
        from accelerate import ParallelismConfig

        check_known_names(name, value, [item.name for item in fields(ParallelismConfig)])
        try:
            value = ParallelismConfig(**value)
        except ValueError as error:
            raise ArgumentError(f"{name}={value!r}: {error}") from error
    if value is None or all(hasattr(value, size) for size in MESH_DIMENSIONS):
        return value
    raise ArgumentError(
        f"{name}={value!r} must be accelerate's ParallelismConfig, or a dict of its sizes, such as {{'tp_size': 2}}."
    )


def mesh_sizes(config: Any, environ: Mapping[str, str]) -> dict[str, int]:
    """The mesh sizes of a ParallelismConfig, or else of the environment of `accelerate launch`; 1 without either.

    >>> mesh_sizes(None, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"})["tensor"]
    2
    """
    if config is not None:
        return {dimension: int(getattr(config, name)) for name, dimension in MESH_DIMENSIONS.items()}
    if environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() not in TRUE_VALUES:
        return dict.fromkeys(MESH_DIMENSIONS.values(), 1)
    return {dimension: int(environ.get(f"PARALLELISM_CONFIG_{name.upper()}", 1)) for name, dimension in MESH_DIMENSIONS.items()}
