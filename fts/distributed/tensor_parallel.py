"""Tensor parallelism: the matrices of a module are sharded over ranks that work on the same examples."""

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
"""The styles that a plan may have, with the names of transformers."""

HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")


def parallelize_module(module: nn.Module, mesh: Any, plan: Mapping[str, Any] | None = None) -> nn.Module:
    """Shard the matrices of a module over ranks that work on the same examples, in place.

    All ranks start with the weights of the main process. Sharded matrices become DTensors; other parameters are replicated, and
    so are their gradients. The output of the forward pass is replicated. `fully_shard` may then shard the result over
    data-parallel ranks.

    Args:
        module: a transformers model with a plan of its own, or any with a given plan. One that transformers has loaded with its
            own tensor parallelism stays as it is.
        mesh: torch's DeviceMesh of one dimension.
        plan: from names of modules, where "*" stands for a number, to styles of transformers ("colwise": by rows of the weight,
            so that outputs are sharded; "rowwise": by its columns, so that outputs are reduced …) or to styles of
            `torch.distributed.tensor.parallel`. By default the model's own.

    Returns:
        The module.

    Raises:
        ArgumentError: there is no plan, it has an unknown style, or a size is not divisible.

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
    matched = _match_plan(module, plan)
    styles = {name: _parallel_style(name, style, module.get_submodule(name), size) for name, style in matched.items()}
    ties = _find_tied_parameters(module)
    _broadcast_replicated(module, mesh, except_for={f"{name}." for name, style in styles.items() if style is not None})
    parallel.parallelize_module(module, mesh, {name: style for name, style in styles.items() if style is not None})
    _restore_tied_parameters(module, ties)
    _redistribute_gradients(module)
    return module


def _match_plan(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The styles of the modules that the plan's patterns match, by name."""
    matched: dict[str, Any] = {}
    names = [name for name, _ in module.named_modules() if name]
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        if isinstance(style, str) and style not in PLAN_STYLES:
            raise ArgumentError(
                f"The plan for tensor parallelism has {style!r} for {pattern!r}, which fts does not support. Use one of "
                f"{', '.join(PLAN_STYLES)}; or shard the model by FSDP, or load it with transformers' DistributedConfig."
            )
        matched.update(dict.fromkeys((name for name in names if expression.fullmatch(name)), style))
    if not matched:
        patterns = abbreviate(list(plan))
        raise ArgumentError(f"The plan for tensor parallelism fits no module of {type(module).__name__}: {patterns}.")
    return matched


def _parallel_style(name: str, style: Any, submodule: nn.Module, size: int) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if not isinstance(style, str):
        return style
    if style == "replicate":
        return None
    if style == "replicated_with_grad_allreduce":
        return SequenceParallel(sequence_dim=2, use_local_output=True)  # norms of heads: (batch, tokens, heads, head_dim)
    weight: Tensor = submodule.weight  # type: ignore[assignment]
    axis = 1 if style.startswith("rowwise") else 0
    may_be_uneven = "gather" in style or "rep" in style or style == "embedding_rowwise"
    if weight.shape[axis] % size and not may_be_uneven:
        raise ArgumentError(
            f"{name!r} has a weight of {tuple(weight.shape)}, whose axis {axis} cannot be sharded into {size} equal parts."
        )
    if style in ("colwise_rep", "colwise_gather_output"):
        return ColwiseParallel(output_layouts=Replicate())
    if style in ("rowwise_rep", "rowwise_split_input", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel() if style == "colwise" else RowwiseParallel()


def _check_heads(module: nn.Module, size: int) -> None:
    config = getattr(module, "config", None)
    for name in HEAD_COUNTS:
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ArgumentError(
                f"{type(module).__name__} has {name}={heads}, which cannot be divided over {size} processes. Use a divisor."
            )


def _find_tied_parameters(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """For each tied parameter, the modules that have it, with the name of the attribute."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, key))
    return [found for found in places.values() if len(found) > 1]


def _restore_tied_parameters(module: nn.Module, ties: list[list[tuple[nn.Module, str]]]) -> None:
    for places in ties:
        placements = {str(getattr(part._parameters[key], "placements", "replicated")) for part, key in places}
        if len(placements) > 1:
            shown = " and ".join(f"{type(part).__name__}.{key}" for part, key in places)
            raise ArgumentError(
                f"{shown} of {type(module).__name__} are one tensor, but the plan shards them differently: "
                f"{', '.join(sorted(placements))}. Use 'embedding_rowwise' for one and 'colwise_gather_output' for the other."
            )
        first, name = places[0]
        for part, key in places[1:]:
            part._parameters[key] = first._parameters[name]


@torch.no_grad()
def _broadcast_replicated(module: nn.Module, mesh: Any, except_for: set[str]) -> None:
    """Broadcast the tensors of the main process, except those that torch scatters from it."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not name.startswith(tuple(except_for)):
            distributed.broadcast(tensor, group_src=0, group=mesh.get_group())


def _redistribute_gradients(module: nn.Module) -> None:
    """Redistribute each gradient like its parameter: autograd leaves that of an embedding replicated, that of a norm partial."""
    for parameter in module.parameters():
        if is_dtensor(parameter):
            hooked: Any = parameter
            hooked.register_hook(functools.partial(redistribute, like=parameter))
