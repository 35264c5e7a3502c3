"""A module whose matrices are cut, so that several processes work on the same rows (tensor parallelism)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fts.dtensors import any_dtensor, is_dtensor, redistribute
from fts.errors import ArgumentError
from fts.messages import abbreviate

PLAN_STYLES = (
    *("colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep", "rowwise_split_input"),
    *("embedding_rowwise", "replicated_with_grad_allreduce", "replicate"),
)
"""What a plan may say: with the names of transformers."""

HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")


def parallelize_module(module: nn.Module, mesh: Any, plan: Mapping[str, Any] | None = None) -> nn.Module:
    """Cut matrices of a module among processes that see the same rows, in place.

    All processes begin with the weights of the first. Matrices that are cut become DTensors; the rest is the same in each
    process, and has the same gradients. The forward pass of each process has the whole output. `fully_shard` may then cut what each
    has among those that see other rows.

    Args:
        module: a transformers model with a plan of its own, or any with one that is given. One that transformers has loaded in
            parts stays as it is.
        mesh: torch's DeviceMesh of one dimension.
        plan: from names of modules, where "*" stands for a number, to words of transformers ("colwise": rows of the weight, so
            that outputs are cut; "rowwise": its columns, so that outputs are summed …) or to styles of
            `torch.distributed.tensor.parallel`. By default the model's own.

    Returns:
        The module.

    Raises:
        ArgumentError: there is no plan, it has a word that is not known here, or sizes do not divide.

    Source: Shoeybi et al. 2019, "Megatron-LM", and torch's `parallelize_module`.
    """
    from torch.distributed.tensor import parallel

    if any_dtensor(module.parameters()):  # transformers has loaded it so
        _redistribute_gradients(module)
        return module
    plan = dict(getattr(module, "tp_plan", None) or {}) if plan is None else dict(plan)
    if not plan:
        raise ArgumentError(
            f"{type(module).__name__} has no plan for tensor parallelism. Give one, such as {{'layers.*.up': 'colwise', "
            "'layers.*.down': 'rowwise'}, or share its parameters by FSDP."
        )
    size = int(mesh.size())
    _check_heads(module, size)
    planned = _match_plan(module, plan)
    styles = {name: _parallel_style(name, what, module.get_submodule(name), size) for name, what in planned.items()}
    ties = _find_tied_parameters(module)
    _broadcast_replicated(module, mesh, except_for={f"{name}." for name, style in styles.items() if style is not None})
    parallel.parallelize_module(module, mesh, {name: style for name, style in styles.items() if style is not None})
    _restore_tied_parameters(module, ties)
    _redistribute_gradients(module)
    return module


def _match_plan(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan, with the names that are there in the places of patterns."""
    found: dict[str, Any] = {}
    names = [name for name, _ in module.named_modules() if name]
    for pattern, what in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        fitting = [name for name in names if expression.fullmatch(name)]
        if isinstance(what, str) and what not in PLAN_STYLES:
            raise ArgumentError(
                f"The plan for tensor parallelism says {what!r} for {pattern!r}, which fts cannot do; it can do "
                f"{', '.join(PLAN_STYLES)}. Share this model's parameters by FSDP, or load it with transformers' DistributedConfig."
            )
        found.update(dict.fromkeys(fitting, what))
    if not found:
        raise ArgumentError(
            f"The plan for tensor parallelism fits no module of {type(module).__name__}: {abbreviate(list(plan))}."
        )
    return found


def _parallel_style(name: str, what: Any, part: nn.Module, size: int) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if not isinstance(what, str):
        return what
    if what == "replicate":
        return None
    if what == "replicated_with_grad_allreduce":
        return SequenceParallel(sequence_dim=2, use_local_output=True)  # norms of heads: (rows, tokens, heads, width)
    weight: Tensor = part.weight  # type: ignore[assignment]
    axis = 1 if what.startswith("rowwise") else 0
    whole = "gather" in what or "rep" in what or what == "embedding_rowwise"
    if weight.shape[axis] % size and not whole:
        raise ArgumentError(
            f"{name!r} has a weight of {tuple(weight.shape)}, whose axis {axis} cannot be cut into {size} equal parts."
        )
    if what in ("colwise_rep", "colwise_gather_output"):
        return ColwiseParallel(output_layouts=Replicate())
    if what in ("rowwise_rep", "rowwise_split_input", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel() if what == "colwise" else RowwiseParallel()


def _check_heads(module: nn.Module, size: int) -> None:
    config = getattr(module, "config", None)
    for name in HEAD_COUNTS:
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ArgumentError(
                f"{type(module).__name__} has {name}={heads}, which {size} processes cannot share. Use a divisor."
            )


def _find_tied_parameters(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Where each parameter lives that lives in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, key))
    return [found for found in places.values() if len(found) > 1]


def _restore_tied_parameters(module: nn.Module, ties: list[list[tuple[nn.Module, str]]]) -> None:
    for places in ties:
        forms = {str(getattr(part._parameters[key], "placements", "whole")) for part, key in places}
        if len(forms) > 1:
            shown = " and ".join(f"{type(part).__name__}.{key}" for part, key in places)
            raise ArgumentError(
                f"{shown} of {type(module).__name__} are one tensor, but the plan cuts them differently: "
                f"{', '.join(sorted(forms))}. Say 'embedding_rowwise' for one and 'colwise_gather_output' for the other."
            )
        first, name = places[0]
        for part, key in places[1:]:
            part._parameters[key] = first._parameters[name]


@torch.no_grad()
def _broadcast_replicated(module: nn.Module, mesh: Any, except_for: set[str]) -> None:
    """Give all processes the first one's tensors; those that are cut are scattered from it anyway."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not name.startswith(tuple(except_for)):
            distributed.broadcast(tensor, group_src=0, group=mesh.get_group())


def _redistribute_gradients(module: nn.Module) -> None:
    """Cut each gradient as its parameter is: autograd gives that of an embedding whole, and that of a norm as terms of a sum."""
    for parameter in module.parameters():
        if is_dtensor(parameter):
            hooked: Any = parameter
            hooked.register_hook(functools.partial(redistribute, form=parameter))
