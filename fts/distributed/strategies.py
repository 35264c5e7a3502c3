"""The strategies of distributed training, as frozen data: no tensor, no process group, nothing of `torch.distributed`.

>>> FSDP(units=("BertLayer",), param_dtype=torch.bfloat16).name
'FSDP2'
"""

from __future__ import annotations

import re
from typing import Any, Literal

import attrs
import torch

from fts.errors import ArgumentError


@attrs.frozen
class SingleProcess:
    """One process with at most one device."""

    @property
    def name(self) -> str:
        """The name in messages."""
        return "one process"


@attrs.frozen
class DDP:
    """Parameters are replicated on all ranks, and gradients are averaged (torch's DistributedDataParallel).

    Attributes:
        find_unused_parameters: whether a loss may leave parameters out; costs a walk through each graph.
        bucket_cap_mb: size of a bucket of gradients in MiB; None for torch's default of 25.
        broadcast_buffers: whether buffers are broadcast from the main process after its forward passes.
        static_graph: whether each step uses the same parameters, so that unused ones are found only once.
        gradient_as_bucket_view: whether gradients are views of the buckets, which saves their size and a copy (torch's default is
            not to).

    Raises:
        ArgumentError: the bucket is not above 0.

    >>> DDP(bucket_cap_mb=0)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: DDP: bucket_cap_mb=0 must be above 0. Leave it out for torch's 25 MiB.
    """

    find_unused_parameters: bool = False
    bucket_cap_mb: float | None = None
    broadcast_buffers: bool = True
    static_graph: bool = False
    gradient_as_bucket_view: bool = True

    def __attrs_post_init__(self) -> None:
        if self.bucket_cap_mb is not None and self.bucket_cap_mb <= 0:
            raise ArgumentError(f"DDP: bucket_cap_mb={self.bucket_cap_mb!r} must be above 0. Leave it out for torch's 25 MiB.")

    @property
    def name(self) -> str:
        """The name in messages."""
        return "DDP"


@attrs.frozen
class FSDP:
    """Parameters, gradients and optimizer moments are sharded over ranks (torch's `fully_shard`, FSDP2).

    Attributes:
        units: the submodules that are gathered and freed as one: class names; a number, for the smallest submodules with at least
            so many parameters; "auto", for the `_no_split_modules` of a transformers model; None, for the model as one unit. The
            parameters outside all units are one more.
        reshard_after_forward: whether parameters are freed after the forward pass and gathered again for the backward pass.
        param_dtype: of gathered parameters and the computation; None for that of the parameters.
        reduce_dtype: in which gradients are reduced; None for `param_dtype`.
        output_dtype: to which the model's floating-point outputs are cast; None leaves them.
        cast_forward_inputs: whether floating-point inputs are cast to `param_dtype`.
        cpu_offload: whether shards are kept, and updated, on the CPU.
        pin_memory: whether their memory is pinned, from which a GPU copies faster.
        activation_checkpointing: whether each unit recomputes its activations in the backward pass.
        activation_checkpointing_offload: whether the inputs of these units are kept on the CPU.
        state_dict_type: whether checkpoints have full tensors ("full"), gathered by one rank, or the local shards ("sharded").
        replicate: the number of replicas, each sharded over its own ranks (hybrid sharding); 1 shards over all ranks.
        ignored_modules: regular expressions for the full names of modules whose frozen parameters are not sharded.

    Raises:
        ArgumentError: a value is invalid.

    >>> FSDP(state_dict_type="local")
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: FSDP: state_dict_type='local' must be 'full' or 'sharded'.
    """

    units: tuple[str, ...] | int | Literal["auto"] | None = "auto"
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True
    cpu_offload: bool = False
    pin_memory: bool = True
    activation_checkpointing: bool = False
    activation_checkpointing_offload: bool = False
    state_dict_type: Literal["full", "sharded"] = "full"
    replicate: int = 1
    ignored_modules: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.state_dict_type not in ("full", "sharded"):
            raise ArgumentError(f"FSDP: state_dict_type={self.state_dict_type!r} must be 'full' or 'sharded'.")
        if self.activation_checkpointing_offload and not self.activation_checkpointing:
            raise ArgumentError(
                "FSDP: activation_checkpointing_offload=True moves the inputs of units that recompute their activations, but "
                "activation_checkpointing=False. Turn both on, or neither."
            )
        if not _is_valid_units(self.units):
            raise ArgumentError(
                f"FSDP: units={self.units!r} must be a tuple of class names, a number of parameters of at least 1, "
                "'auto' or None."
            )
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ArgumentError(f"FSDP: {name}={dtype!r} must be a floating-point dtype, such as torch.bfloat16.")
        if not isinstance(self.replicate, int) or self.replicate < 1:
            raise ArgumentError(f"FSDP: replicate={self.replicate!r} must be a whole number of at least 1.")
        for pattern in self.ignored_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ArgumentError(f"FSDP: ignored_modules: {pattern!r} is not a regular expression ({error}).") from error

    @property
    def name(self) -> str:
        """The name in messages."""
        return "FSDP2" if self.replicate == 1 else f"FSDP2 in {self.replicate} replicas"


@attrs.frozen
class DeepSpeed:
    """DeepSpeed's engine with an optimizer of its own; ZeRO's stages partition moments (1), gradients (2) and parameters (3).

    Attributes:
        config: DeepSpeed's own, as https://www.deepspeed.ai/docs/config-json/ describes it.

    Raises:
        ArgumentError: there is no such stage.

    >>> DeepSpeed({"zero_optimization": {"stage": 4}})
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: DeepSpeed: zero_optimization.stage=4 must be 0, 1, 2 or 3.
    """

    config: dict[str, Any] = attrs.field(hash=False)

    def __attrs_post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ArgumentError(f"DeepSpeed: zero_optimization.stage={self.stage!r} must be 0, 1, 2 or 3.")

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        zero = self.config.get("zero_optimization")
        stage: int = zero.get("stage", 0) if isinstance(zero, dict) else 0
        return stage

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"DeepSpeed, ZeRO stage {self.stage}"


Strategy = SingleProcess | DDP | FSDP | DeepSpeed


def _is_valid_units(units: Any) -> bool:
    if units is None or units == "auto":
        return True
    if isinstance(units, tuple):
        return bool(units) and all(isinstance(name, str) and name for name in units)
    return isinstance(units, int) and not isinstance(units, bool) and units >= 1
