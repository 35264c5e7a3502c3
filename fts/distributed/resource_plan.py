"""The memory of each process, and the bytes that it sends in a step, before a training is started.

Nothing is allocated and no process is started: these are formulas of shapes (docs/scale.md derives them). Sources: Rajbhandari
et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"; Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models"; Shoeybi et al. 2019, "Megatron-LM"; Patarasuk and Yuan 2009, "Bandwidth Optimal
All-reduce Algorithms", for rings.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Literal

import attrs

from fts.distributed.model_shapes import ModelShapes, Shape, local_shapes, numel, shard_matrices
from fts.errors import ArgumentError

DEEPSPEED_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: the number of gradient elements that it reduces at a time."""

FORWARD_REDUCTIONS, BACKWARD_REDUCTIONS = 2, 5
"""The all-reduces of a tensor-parallel layer: of activations after attention and MLP, and of the gradient of the input of each
column-parallel matrix (query, key, value, gate, up). Megatron, which fuses these into two matrices, has 2 and 2."""


@attrs.frozen
class Precision:
    """Bytes per element.

    Attributes:
        parameters: that the optimizer updates, or that are copies of master weights.
        compute: parameters in the forward and backward pass, and activations.
        gradients: as they are accumulated.
        moments: of the optimizer.
        master: a second copy of the parameters in float32; 0 for none.
    """

    parameters: int
    compute: int
    gradients: int
    moments: int
    master: int = 0


PRECISIONS = MappingProxyType(
    {
        "fp32": Precision(4, 4, 4, 4),
        "bf16": Precision(4, 2, 4, 4),  # `bf16=True`: float32 parameters under autocast
        "fp16": Precision(4, 2, 4, 4),
        "bf16-master": Precision(2, 2, 2, 4, 4),  # ZeRO's 16 bytes a parameter, with AdamW
        "bf16-pure": Precision(2, 2, 2, 2),
    }
)


def _adafactor_moments(shape: Shape) -> int:
    return sum(shape[-2:]) * numel([shape[:-2]]) if len(shape) > 1 else numel([shape])


OPTIMIZERS: MappingProxyType[str, Callable[[Shape], float]] = MappingProxyType(
    {
        "adamw": lambda shape: 2 * numel([shape]),
        "sgd": lambda shape: 0,
        "momentum": lambda shape: numel([shape]),
        "lion": lambda shape: numel([shape]),
        "adafactor": _adafactor_moments,
        "adamw-8bit": lambda shape: 2 * numel([shape]) / 4,  # of the 4 bytes of a float32
    }
)
"""The number of float32 values in an optimizer's state for a parameter of a shape."""

STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "tp", "deepspeed-1", "deepspeed-2", "deepspeed-3")


@attrs.frozen
class TrainingSetup:
    """How a model is trained.

    Attributes:
        strategy: one of `STRATEGIES`.
        world: the world size.
        shard: over how many processes each replica is sharded, under "hsdp".
        tensor: over how many processes each matrix is sharded; the strategy is over the rest. "tp" is that and DDP.
        precision: one of `PRECISIONS`.
        optimizer: one of `OPTIMIZERS`.
        batch: examples of a micro-batch of one process.
        sequence: tokens of an example; 0 leaves activations out.
        accumulate: micro-batches of a step.
        no_sync: whether FSDP reduces gradients once a step, and keeps full gradients until then, not after each micro-batch.
        reshard: whether FSDP frees the parameters of layers after the forward pass, and gathers them again
            (`reshard_after_forward`). The backward pass needs parameters outside the layers first, so they stay gathered.
        reduce: bytes per element in which FSDP reduces gradients; None for those in which they are accumulated.
        bucket_view: whether DDP's gradients are views of its buckets (`gradient_as_bucket_view`).
        checkpointing: whether each layer keeps its input only and recomputes its activations in the backward pass.
        attention: "eager" keeps the attention weights for the backward pass, "fused" does not.

    Raises:
        ArgumentError: a value is unknown, or a number of processes is not divisible.

    >>> TrainingSetup("ddp", world=6, tensor=4)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: 6 processes cannot be divided into groups of 4 that share matrices. Choose a divisor of 6.
    """

    strategy: str = "single"
    world: int = 1
    shard: int = 8
    tensor: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    batch: int = 1
    sequence: int = 0
    accumulate: int = 1
    no_sync: bool = True
    reshard: bool = True
    reduce: int | None = None
    bucket_view: bool = True
    checkpointing: bool = False
    attention: Literal["fused", "eager"] = "fused"

    def __attrs_post_init__(self) -> None:
        known = {
            "strategy": STRATEGIES,
            "precision": tuple(PRECISIONS),
            "optimizer": tuple(OPTIMIZERS),
            "attention": ("fused", "eager"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ArgumentError(f"{name}={getattr(self, name)!r} is unknown. Choose one of {', '.join(values)}.")
        for name, least in {"world": 1, "shard": 1, "tensor": 1, "batch": 1, "sequence": 0, "accumulate": 1}.items():
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}={getattr(self, name)}: give a number of at least {least}.")
        if self.strategy == "single" and self.world * self.tensor > 1:
            raise ArgumentError(f"world={self.world}: 'single' is one process. Choose another strategy, such as 'ddp'.")
        if self.world % self.tensor:
            raise ArgumentError(
                f"{self.world} processes cannot be divided into groups of {self.tensor} that share matrices. "
                f"Choose a divisor of {self.world}."
            )
        if self.strategy == "hsdp" and self.data_parallel_size % self.shard:
            raise ArgumentError(
                f"{self.data_parallel_size} processes cannot be divided into groups of {self.shard} that each hold the model. "
                f"Choose a divisor of {self.data_parallel_size}."
            )

    @property
    def data_parallel_size(self) -> int:
        """How many processes, or tensor-parallel groups, have examples of their own."""
        return self.world // self.tensor

    @property
    def num_shards(self) -> int:
        """Over how many processes the strategy shards."""
        return {"single": 1, "ddp": 1, "tp": 1, "hsdp": self.shard}.get(self.strategy, self.data_parallel_size)

    @property
    def dtype_bytes(self) -> Precision:
        """Bytes per element. DeepSpeed has master weights whenever it computes in 16 bits."""
        deepspeed = self.strategy.startswith("deepspeed") and self.precision in ("bf16", "fp16")
        return PRECISIONS["bf16-master" if deepspeed else self.precision]

    @property
    def reduce_bytes(self) -> int:
        """Bytes per element in which gradients are reduced."""
        return self.reduce or self.dtype_bytes.gradients


@attrs.frozen
class Memory:
    """Bytes on the process with the largest shards; all at the same time, so it is an upper bound.

    Attributes:
        parameters: those that are kept, sharded or replicated.
        gradients: those that are kept until the update.
        moments: of the optimizer.
        master: float32 weights for parameters of 16 bits.
        copies: parameters that autocast has cast, kept from the forward to the backward pass.
        buckets: into which gradients are copied (DDP without `gradient_as_bucket_view`, DeepSpeed).
        gathered: full parameters and gradients that FSDP or ZeRO 3 has at a time.
        activations: those that are kept for the backward pass, and the logits.
    """

    parameters: int
    gradients: int
    moments: int
    master: int = 0
    copies: int = 0
    buckets: int = 0
    gathered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(attrs.astuple(self))


@attrs.frozen
class Collective:
    """A collective of a step, in a ring.

    Attributes:
        kind: all-reduce, reduce-scatter or all-gather.
        what: parameters, gradients or activations.
        times: how often in a step.
        nbytes: of the full tensors, each time.
        processes: in the ring.

    >>> Collective("all-reduce", "gradients", times=1, nbytes=1000, processes=4).sent
    1500
    """

    kind: Literal["all-reduce", "reduce-scatter", "all-gather"]
    what: str
    times: int
    nbytes: int
    processes: int

    @property
    def sent(self) -> int:
        """Bytes that each process sends, and receives, in a step: (n - 1) / n of the full tensors, twice for an all-reduce."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.times * self.nbytes * (self.processes - 1) // self.processes


@attrs.frozen
class ResourcePlan:
    """What a training needs on each process.

    Attributes:
        memory: in bytes.
        traffic: the collectives of a step.
    """

    memory: Memory
    traffic: tuple[Collective, ...]

    @property
    def sent(self) -> int:
        """Bytes that each process sends in a step."""
        return sum(collective.sent for collective in self.traffic)


def plan_resources(model: ModelShapes, setup: TrainingSetup) -> ResourcePlan:
    """What a training needs.

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> setup = TrainingSetup("deepspeed-3", world=64, precision="bf16")
    >>> memory = plan_resources(shapes_from_counts(7_500_000_000), setup).memory
    >>> sum((memory.parameters, memory.gradients, memory.master, memory.moments)) / 1e9
    1.875

    Figure 1 of Rajbhandari et al. 2020 has 1.9 GB.
    """
    return ResourcePlan(estimate_memory(model, setup), estimate_traffic(model, setup))


def estimate_memory(model: ModelShapes, setup: TrainingSetup) -> Memory:
    """The memory of one process.

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> estimate_memory(shapes_from_counts(1000), TrainingSetup("fsdp", world=4)).moments
    2000
    """
    local, size, strategy = shard_matrices(model, setup.tensor), setup.dtype_bytes, setup.strategy
    parameter_shards = setup.num_shards if strategy in ("fsdp", "hsdp", "deepspeed-3") else 1
    gradient_shards = setup.num_shards if strategy in ("fsdp", "hsdp", "deepspeed-2", "deepspeed-3") else 1
    updated = local_shapes(local.trained, setup.num_shards)
    has_copies = size.compute < size.parameters and strategy in ("single", "ddp", "tp")
    return Memory(
        parameters=size.parameters * numel(local_shapes(local.shapes, parameter_shards)),
        gradients=size.gradients * numel(local_shapes(local.trained, gradient_shards)),
        moments=round(size.moments * sum(map(OPTIMIZERS[setup.optimizer], updated))),
        master=size.master * numel(updated),
        copies=size.compute * numel(local.shapes) * has_copies,
        buckets=size.gradients * _bucket_size(numel(local.trained), setup),
        gathered=_gathered_bytes(local, setup),
        activations=estimate_activations(model, setup),
    )


def _bucket_size(trained: int, setup: TrainingSetup) -> int:
    if setup.strategy.startswith("deepspeed"):
        return min(trained, DEEPSPEED_BUCKET)
    return trained if setup.strategy in ("ddp", "tp") and setup.data_parallel_size > 1 and not setup.bucket_view else 0


def _gathered_bytes(local: ModelShapes, setup: TrainingSetup) -> int:
    """Full tensors at a time: parameters of two layers and outside layers; gradients that are new, and that are being reduced."""
    if setup.strategy not in ("fsdp", "hsdp", "deepspeed-3") or setup.num_shards == 1:
        return 0
    compute, n = setup.dtype_bytes.compute, setup.num_shards
    full = [n * numel(local_shapes(unit.shapes, n)) for unit in local.units]
    trained = [n * numel(local_shapes(unit.trained, n)) for unit in local.units]
    if setup.strategy == "deepspeed-3":
        parameters = compute * min(2, len(full)) * max(full)
    elif setup.reshard:
        root, *layers = full
        parameters = compute * (root + min(2, len(layers)) * max(layers, default=0))
    else:
        parameters = compute * sum(full)
    accumulated = sum(trained) if setup.strategy != "deepspeed-3" and setup.no_sync and setup.accumulate > 1 else 0
    return parameters + compute * max(trained) + setup.reduce_bytes * (max(trained) + accumulated)


def estimate_activations(model: ModelShapes, setup: TrainingSetup) -> int:
    """Bytes of a transformer's activations (Korthikanti et al. 2022, equation 2, for any dtype).

    A layer keeps `s b h (4 c + 2 + 12 c / t)` bytes, and `a s^2 b (2 c + 1) / t` more for attention weights, with `s` tokens, `b`
    examples, hidden size `h`, `a` heads, `c` bytes per element and tensor-parallel size `t`. With c = 2 and t = 1 it is the
    paper's `s b h (34 + 5 a s / h)`. With activation checkpointing each layer keeps its input, and one at a time all its
    activations. Logits are float32, and not sharded.

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> model = shapes_from_counts(1_000_000, layers=2, hidden=64, heads=4)
    >>> estimate_activations(model, TrainingSetup(precision="bf16-pure", batch=3, sequence=10)) == 2 * 10 * 3 * 64 * 34
    True
    """
    c, t, tokens = setup.dtype_bytes.compute, setup.tensor, setup.batch * setup.sequence
    layer = tokens * model.hidden * (4 * c + 2) + tokens * model.hidden * 12 * c // t
    if setup.attention == "eager":
        layer += model.heads * setup.sequence * tokens * (2 * c + 1) // t
    layers = model.layers * c * tokens * model.hidden + layer if setup.checkpointing else model.layers * layer
    return (layers if model.layers else 0) + 4 * tokens * model.vocabulary


def estimate_traffic(model: ModelShapes, setup: TrainingSetup) -> tuple[Collective, ...]:
    """The collectives of a step, without those of a few numbers (norms, metrics, flags).

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> setup = TrainingSetup("fsdp", world=4, accumulate=2)
    >>> [(collective.kind, collective.times, collective.sent) for collective in estimate_traffic(shapes_from_counts(1000), setup)]
    [('all-gather', 4, 12000), ('reduce-scatter', 1, 3000)]
    """
    local, size, data = shard_matrices(model, setup.tensor), setup.dtype_bytes, setup.data_parallel_size
    gradients, parameters, micro_batches = numel(local.trained), numel(local.shapes), setup.accumulate
    traffic: list[Collective] = []
    if setup.strategy in ("ddp", "tp"):  # with `no_sync`, as fts runs it
        traffic = [Collective("all-reduce", "gradients", 1, size.gradients * gradients, data)]
    elif setup.strategy in ("fsdp", "hsdp"):
        n, syncs = setup.num_shards, 1 if setup.no_sync else micro_batches
        root, *layers = (size.compute * n * numel(local_shapes(unit.shapes, n)) for unit in local.units)
        reduced = setup.reduce_bytes * n * numel(local_shapes(local.trained, n))
        traffic = [
            Collective("all-gather", "parameters of layers", micro_batches * (1 + setup.reshard), sum(layers), n),
            Collective("all-gather", "other parameters", micro_batches * (1 + (setup.reshard and not layers)), root, n),
            Collective("reduce-scatter", "gradients", syncs, reduced, n),
            Collective("all-reduce", "parts of gradients", syncs, reduced // n, data // n),
        ]
    elif setup.strategy in ("deepspeed-1", "deepspeed-2"):
        times = 1 if setup.strategy == "deepspeed-1" else micro_batches
        traffic = [
            Collective("reduce-scatter", "gradients", times, size.gradients * gradients, data),
            Collective("all-gather", "parameters", 1, size.parameters * gradients, data),
        ]
    elif setup.strategy == "deepspeed-3":
        traffic = [
            Collective("all-gather", "parameters", 2 * micro_batches, size.compute * parameters, data),
            Collective("reduce-scatter", "gradients", micro_batches, size.gradients * gradients, data),
        ]
    reductions = model.layers * (FORWARD_REDUCTIONS * (1 + setup.checkpointing) + BACKWARD_REDUCTIONS)
    token_bytes = size.compute * setup.batch * setup.sequence
    if local.units[0] != model.units[0]:  # the output matrix is column-parallel
        reductions += 1
        traffic.append(Collective("all-gather", "logits", micro_batches, token_bytes * model.vocabulary, setup.tensor))
    traffic.append(Collective("all-reduce", "activations", micro_batches * reductions, token_bytes * model.hidden, setup.tensor))
    return tuple(collective for collective in traffic if collective.processes > 1 and collective.times * collective.nbytes)
