"""What a training needs on each process, before it is started: bytes of memory, and bytes that are sent in a step.

Nothing is allocated and no process is started: these are formulas over shapes (docs/scale.md derives them). Sources: Rajbhandari
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
"""How many gradients DeepSpeed sends at a time (its `reduce_bucket_size`)."""

FORWARD_SUMS, BACKWARD_SUMS = 2, 5
"""How often a tensor-parallel layer sums: activations behind attention and MLP, and the gradient of the input of each matrix that
is cut by columns (query, key, value, gate, up). Megatron, which joins them into two matrices, has 2 and 2."""


@attrs.frozen
class Precision:
    """Bytes for each number.

    Attributes:
        parameters: that the optimizer updates, or that are updated from master weights.
        compute: parameters in the forward and backward pass, and activations.
        gradients: as they are kept.
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
        "bf16": Precision(4, 2, 4, 4),  # `bf16=True`: float32 parameters that are cast where they are used
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
"""How many numbers an optimizer keeps for a parameter of a shape."""

STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "tp", "deepspeed-1", "deepspeed-2", "deepspeed-3")


@attrs.frozen
class TrainingSetup:
    """How a model is trained.

    Attributes:
        strategy: one of `STRATEGIES`.
        world: how many processes there are.
        shard: how many processes hold one copy of the model among them, under "hsdp".
        tensor: how many processes share each matrix; the others are left to the strategy. "tp" is that and DDP.
        precision: one of `PRECISIONS`.
        optimizer: one of `OPTIMIZERS`.
        batch: rows of a micro-batch of one process.
        sequence: tokens of a row; 0 leaves activations out.
        accumulate: micro-batches of a step.
        no_sync: whether FSDP exchanges gradients once a step, which keeps them whole until then, and not in each micro-batch.
        reshard: whether FSDP frees the parameters of layers after the forward pass, and gathers them again
            (`reshard_after_forward`). What lies outside of the layers is needed first in the backward pass, and stays.
        reduce: bytes of each number in which FSDP sums gradients; None for those in which they are kept.
        bucket_view: whether DDP's gradients lie in its buckets (`gradient_as_bucket_view`).
        checkpointing: whether each layer keeps its input only and is computed again in the backward pass.
        attention: "fused" does not keep the weights of attention, "eager" does.

    Raises:
        ArgumentError: a value is unknown, or numbers of processes do not divide.

    >>> TrainingSetup("ddp", world=6, tensor=4)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: 6 processes cannot be cut into groups of 4 that share matrices. Choose a divisor of 6.
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
                f"{self.world} processes cannot be cut into groups of {self.tensor} that share matrices. "
                f"Choose a divisor of {self.world}."
            )
        if self.strategy == "hsdp" and self.data_parallel_size % self.shard:
            raise ArgumentError(
                f"{self.data_parallel_size} processes cannot be cut into groups of {self.shard} that each hold the model. "
                f"Choose a divisor of {self.data_parallel_size}."
            )

    @property
    def data_parallel_size(self) -> int:
        """How many processes, or tensor-parallel groups, see different rows."""
        return self.world // self.tensor

    @property
    def num_shards(self) -> int:
        """Over how many processes something is sharded."""
        return {"single": 1, "ddp": 1, "tp": 1, "hsdp": self.shard}.get(self.strategy, self.data_parallel_size)

    @property
    def dtype_bytes(self) -> Precision:
        """Bytes for each number. DeepSpeed has master weights wherever it computes in 16 bits."""
        deepspeed = self.strategy.startswith("deepspeed") and self.precision in ("bf16", "fp16")
        return PRECISIONS["bf16-master" if deepspeed else self.precision]

    @property
    def reduce_bytes(self) -> int:
        """Bytes of each number in which gradients are summed over processes."""
        return self.reduce or self.dtype_bytes.gradients


@attrs.frozen
class Memory:
    """Bytes on the process that has most; all at once, so it is an upper bound.

    Attributes:
        parameters: as they are kept.
        gradients: as they are kept until the update.
        moments: of the optimizer.
        master: weights in float32 beside parameters of 16 bits.
        copies: parameters that autocast has cast, kept from the forward to the backward pass.
        buckets: what gradients are copied into to be sent (DDP without `gradient_as_bucket_view`, DeepSpeed).
        gathered: parameters and gradients that FSDP or ZeRO 3 has whole at a time.
        activations: what the forward pass keeps for the backward pass, and the logits.
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
    """What is exchanged in a step, in a ring.

    Attributes:
        kind: all-reduce, reduce-scatter or all-gather.
        what: parameters, gradients or activations.
        times: how often in a step.
        nbytes: of the whole, at a time.
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
        """Bytes that each process sends in a step, and receives: (n - 1) / n of the whole, twice for an all-reduce."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.times * self.nbytes * (self.processes - 1) // self.processes


@attrs.frozen
class ResourcePlan:
    """What a training needs on each process.

    Attributes:
        memory: in bytes.
        traffic: what is exchanged in each step.
    """

    memory: Memory
    traffic: tuple[Collective, ...]

    @property
    def sent(self) -> int:
        """Bytes that each process sends in a step."""
        return sum(one.sent for one in self.traffic)


def plan_resources(model: ModelShapes, setup: TrainingSetup) -> ResourcePlan:
    """What a training needs.

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> found = plan_resources(shapes_from_counts(7_500_000_000), TrainingSetup("deepspeed-3", world=64, precision="bf16"))
    >>> sum((found.memory.parameters, found.memory.gradients, found.memory.master, found.memory.moments)) / 1e9
    1.875

    which is figure 1 of Rajbhandari et al. 2020: 1.9 GB.
    """
    return ResourcePlan(estimate_memory(model, setup), estimate_traffic(model, setup))


def estimate_memory(model: ModelShapes, setup: TrainingSetup) -> Memory:
    """The bytes of one process.

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> estimate_memory(shapes_from_counts(1000), TrainingSetup("fsdp", world=4)).moments
    2000
    """
    own, size, strategy = shard_matrices(model, setup.tensor), setup.dtype_bytes, setup.strategy
    of_parameters = setup.num_shards if strategy in ("fsdp", "hsdp", "deepspeed-3") else 1
    of_gradients = setup.num_shards if strategy in ("fsdp", "hsdp", "deepspeed-2", "deepspeed-3") else 1
    trained = numel(own.trained)
    updated = local_shapes(own.trained, setup.num_shards)
    copied = size.compute < size.parameters and strategy in ("single", "ddp", "tp")
    return Memory(
        parameters=size.parameters * numel(local_shapes(own.shapes, of_parameters)),
        gradients=size.gradients * numel(local_shapes(own.trained, of_gradients)),
        moments=round(size.moments * sum(map(OPTIMIZERS[setup.optimizer], updated))),
        master=size.master * numel(updated),
        copies=size.compute * numel(own.shapes) * copied,
        buckets=size.gradients * _bucket_size(trained, setup),
        gathered=_gathered_bytes(own, setup),
        activations=estimate_activations(model, setup),
    )


def _bucket_size(trained: int, setup: TrainingSetup) -> int:
    if setup.strategy.startswith("deepspeed"):
        return min(trained, DEEPSPEED_BUCKET)
    return trained if setup.strategy in ("ddp", "tp") and setup.data_parallel_size > 1 and not setup.bucket_view else 0


def _gathered_bytes(own: ModelShapes, setup: TrainingSetup) -> int:
    """What is whole at a time: parameters of a layer, the next, and outside of layers; gradients that are new, and being sent."""
    if setup.strategy not in ("fsdp", "hsdp", "deepspeed-3") or setup.num_shards == 1:
        return 0
    compute, n = setup.dtype_bytes.compute, setup.num_shards
    whole = [n * numel(local_shapes(unit.shapes, n)) for unit in own.units]
    trained = [n * numel(local_shapes(unit.trained, n)) for unit in own.units]
    if setup.strategy == "deepspeed-3":
        parameters = compute * min(2, len(whole)) * max(whole)
    elif setup.reshard:
        outside, *layers = whole
        parameters = compute * (outside + min(2, len(layers)) * max(layers, default=0))
    else:
        parameters = compute * sum(whole)
    waiting = sum(trained) if setup.strategy != "deepspeed-3" and setup.no_sync and setup.accumulate > 1 else 0
    return parameters + compute * max(trained) + setup.reduce_bytes * (max(trained) + waiting)


def estimate_activations(model: ModelShapes, setup: TrainingSetup) -> int:
    """Bytes that the forward pass of a transformer keeps (Korthikanti et al. 2022, equation 2, for any width of numbers).

    A layer keeps `s b h (4 c + 2 + 12 c / t)` bytes, and `a s^2 b (2 c + 1) / t` more for weights of attention, with `s` tokens,
    `b` rows, width `h`, `a` heads, `c` bytes a number and `t` processes that share matrices. With c = 2 and t = 1 it is the
    paper's `s b h (34 + 5 a s / h)`. Checkpointed, it keeps its input, and one layer at a time is there as a whole. Logits are
    float32, and whole.

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
    kept = model.layers * c * tokens * model.hidden + layer if setup.checkpointing else model.layers * layer
    return (kept if model.layers else 0) + 4 * tokens * model.vocabulary


def estimate_traffic(model: ModelShapes, setup: TrainingSetup) -> tuple[Collective, ...]:
    """What is exchanged in a step. Sums of a few numbers (norms, metrics, flags) are left out.

    Args:
        model: its dimensions.
        setup: how it is trained.

    >>> from fts.distributed.model_shapes import shapes_from_counts
    >>> [(one.kind, one.times, one.sent) for one in estimate_traffic(shapes_from_counts(1000), TrainingSetup("fsdp", world=4, accumulate=2))]
    [('all-gather', 4, 12000), ('reduce-scatter', 1, 3000)]
    """
    own, size, data = shard_matrices(model, setup.tensor), setup.dtype_bytes, setup.data_parallel_size
    gradients, parameters, micro = numel(own.trained), numel(own.shapes), setup.accumulate
    each = 1 if setup.no_sync else micro
    found: list[Collective] = []
    if setup.strategy in ("ddp", "tp"):  # with `no_sync`, as fts runs it
        found = [Collective("all-reduce", "gradients", 1, size.gradients * gradients, data)]
    elif setup.strategy in ("fsdp", "hsdp"):
        n = setup.num_shards
        outside, *layers = (size.compute * n * numel(local_shapes(unit.shapes, n)) for unit in own.units)
        reduced = setup.reduce_bytes * n * numel(local_shapes(own.trained, n))
        found = [
            Collective("all-gather", "parameters of layers", micro * (1 + setup.reshard), sum(layers), n),
            Collective("all-gather", "other parameters", micro * (1 + (setup.reshard and not layers)), outside, n),
            Collective("reduce-scatter", "gradients", each, reduced, n),
            Collective("all-reduce", "parts of gradients", each, reduced // n, data // n),
        ]
    elif setup.strategy in ("deepspeed-1", "deepspeed-2"):
        times = 1 if setup.strategy == "deepspeed-1" else micro
        found = [
            Collective("reduce-scatter", "gradients", times, size.gradients * gradients, data),
            Collective("all-gather", "parameters", 1, size.parameters * gradients, data),
        ]
    elif setup.strategy == "deepspeed-3":
        found = [
            Collective("all-gather", "parameters", 2 * micro, size.compute * parameters, data),
            Collective("reduce-scatter", "gradients", micro, size.gradients * gradients, data),
        ]
    sums = model.layers * (FORWARD_SUMS * (1 + setup.checkpointing) + BACKWARD_SUMS)
    tokens = size.compute * setup.batch * setup.sequence
    if own.units[0] != model.units[0]:  # the output matrix is cut by columns
        sums += 1
        found.append(Collective("all-gather", "logits", micro, tokens * model.vocabulary, setup.tensor))
    found.append(Collective("all-reduce", "activations", micro * sums, tokens * model.hidden, setup.tensor))
    return tuple(one for one in found if one.processes > 1 and one.times * one.nbytes)
