"""Norms of tensors, full tensors also where they are sharded: one all-reduce for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fts.dtensors import any_dtensor, is_dtensor, local_tensors, mesh_and_placements, reduce_partial, sum_over_shards, to_local
from fts.transforms._fast_paths import WIDE_DTYPES
from fts.transforms._scalars import widest


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers in them; 0 for none."""
    norms = norms_of(tensors)
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    return norm


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each, 0-d, in its dtype or at least float32."""
    if not any_dtensor(tensors):
        return [_norm(tensor) for tensor in tensors]
    tensors = [reduce_partial(tensor) for tensor in tensors]
    return _all_reduce_norms([_norm(to_local(tensor)) for tensor in tensors], tensors)


def norm_now(tensors: Sequence[Tensor]) -> Tensor:
    """As `norm_of`, with one kernel where there is one: for fast paths."""
    tensors = [reduce_partial(tensor) for tensor in tensors] if any_dtensor(tensors) else tensors
    parts = local_tensors(tensors)
    if not _alike(parts):
        return norm_of(tensors)
    norms = list(torch._foreach_norm(parts))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(_all_reduce_norms(norms, tensors) if any_dtensor(tensors) else norms))
    return norm


def _all_reduce_norms(parts: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms of full tensors from those of local shards: one all-reduce of squares for all tensors with the same placements."""
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_dtensor(tensor):
            mesh, placements = mesh_and_placements(tensor)
            groups.setdefault((mesh, tuple(placement.is_replicate() for placement in placements)), []).append(i)
    norms = list(parts)
    for (_, replicated), places in groups.items():
        if all(replicated):
            continue
        # in the widest dtype, in which squares of float32 numbers neither overflow nor round noticeably
        squares = torch.stack([parts[i].to(widest(parts[i].device)) for i in places]).square()
        for i, norm in zip(places, sum_over_shards(squares, tensors[places[0]]).sqrt().unbind(), strict=True):
            norms[i] = norm.to(parts[i].dtype)
    return norms


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=tensor.dtype if tensor.dtype in WIDE_DTYPES else torch.float32)
    return norm


def _alike(tensors: Sequence[Tensor]) -> bool:
    return {tensor.dtype for tensor in tensors} <= WIDE_DTYPES and len({tensor.device for tensor in tensors}) == 1
