"""Updates that are withheld: zeros take their place, and the state inside stays as it was."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fts.dtensors import any_dtensor, local_tensors, mesh_and_placements, sum_over_shards
from fts.transforms._fast_paths import Apply
from fts.transforms._info import values_of
from fts.typing import Info, OptState, Params, Transform


def withheld_unless(
    good: Tensor, inner: Transform, grads: Params, state: OptState, params: Params | None
) -> tuple[Params, OptState, Info]:
    """The update of a transform where the condition holds; else zeros, and the state that it had."""
    updates, after, info = inner.update(grads, state, params)
    updates = {name: torch.where(good.to(u.device), u, 0.0) for name, u in updates.items()}
    return updates, where(good, after, state), info


def withheld_now_unless(
    good: bool, inner: Transform, inner_apply: Apply, grads: Params, state: OptState, params: Params
) -> tuple[Params, OptState, Info]:
    """The same for fast paths, by the transform's own."""
    if good:
        return inner_apply(grads, state, params)
    _, _, info = inner.update(grads, state, params)  # for what it reports; writes nothing
    return params, state, info


def counted(good: Tensor, total: Tensor, in_a_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether an update is withheld (0 or 1), how many were, and how many since the last that was not."""
    withheld = (~good).to(torch.int64)
    return withheld, total + withheld, (in_a_row + 1) * withheld


def counted_now(good: bool, total: Tensor, in_a_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for fast paths: the counts are written, and those that come back are copies, to be reported."""
    if good:
        in_a_row.zero_()
    else:
        total.add_(1)
        in_a_row.add_(1)
    return torch.full((), int(not good)), total.clone(), in_a_row.clone()


def skip_report(skipped: Tensor, total: Tensor, in_a_row: Tensor) -> Info:
    """What transforms that skip updates report of it."""
    return {"skipped": skipped, "skipped_total": total, "skipped_in_a_row": in_a_row}


def check_unless_withheld(inner: Transform, info: Info, key: str) -> None:
    """The check of a transform, unless `key` says that its update was withheld: what it reported then is of no update."""
    if inner.check is not None and not any(float(value) for _, value in values_of(info, key)):
        inner.check(info)


def where(condition: Tensor, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`, leaf by leaf."""
    return pytree.tree_map(lambda a, b: torch.where(condition.to(a.device), a, b), yes, no)


def all_finite(grads: Params, device: torch.device) -> Tensor:
    """Whether all numbers are finite, also those that lie on other processes; 0-d bool on `device`."""
    flags: dict[Any, list[Tensor]] = {}
    likes: dict[Any, Tensor] = {}
    for grad, part in zip(grads.values(), local_tensors(grads.values()), strict=True):
        form = mesh_and_placements(grad)
        likes[form] = grad
        flags.setdefault(form, []).append(part.isfinite().all().to(device))
    finite = [torch.stack(found).all() for found in flags.values()]
    if any_dtensor(likes.values()):
        finite = [
            one if form is None else sum_over_shards((~one).to(torch.int64), likes[form]) == 0
            for form, one in zip(flags, finite, strict=True)
        ]
    return torch.stack(finite).all()


def all_finite_now(grads: Params) -> bool:
    """On the CPU: a finite norm proves finite gradients with one kernel; else look again, as squares may overflow."""
    if any_dtensor(grads.values()):
        return bool(all_finite(grads, torch.device("cpu")))
    norms = torch._foreach_norm(list(grads.values()))
    return math.isfinite(sum(map(float, norms))) or all(bool(g.isfinite().all()) for g in grads.values())
