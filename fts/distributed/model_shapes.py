"""The shapes of a model's parameters, without tensors, for a resource plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TypeAlias

import attrs
from torch import nn

from fts.errors import ArgumentError

Shape: TypeAlias = tuple[int, ...]


@attrs.frozen
class FSDPUnit:
    """Parameters that `fully_shard` gathers and frees as one.

    Attributes:
        trained: the shapes of the trained parameters.
        frozen: the shapes of the frozen ones.

    >>> FSDPUnit(trained=((3, 4), (4,))).numel
    16
    """

    trained: tuple[Shape, ...]
    frozen: tuple[Shape, ...] = ()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of all parameters."""
        return self.trained + self.frozen

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return numel(self.shapes)


@attrs.frozen
class ModelShapes:
    """The dimensions of a transformer, or of any model where `layers` is 0.

    Attributes:
        units: the FSDP units; first that of the root, with the parameters outside its layers.
        layers: the number of blocks.
        hidden: the hidden size.
        heads: of attention, in each block.
        vocabulary: the vocabulary size.
    """

    units: tuple[FSDPUnit, ...]
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    vocabulary: int = 0

    @property
    def trained(self) -> tuple[Shape, ...]:
        """The shapes of all trained parameters."""
        return tuple(shape for unit in self.units for shape in unit.trained)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of all parameters."""
        return tuple(shape for unit in self.units for shape in unit.shapes)


def numel(shapes: Iterable[Shape]) -> int:
    """The number of elements of tensors of these shapes.

    >>> numel([(2, 3), (5,), ()])
    12
    """
    return sum(map(math.prod, shapes))


def local_shape(shape: Shape, processes: int) -> Shape:
    """The shape of the local shard of a tensor that is sharded along its first axis; on the last ranks it may be smaller.

    >>> local_shape((5, 3), 2), local_shape((), 2)
    ((3, 3), ())
    """
    return (-(-shape[0] // processes), *shape[1:]) if shape else shape


def local_shapes(shapes: Iterable[Shape], processes: int) -> tuple[Shape, ...]:
    """`local_shape` of each."""
    return tuple(local_shape(shape, processes) for shape in shapes)


def shard_matrices(model: ModelShapes, processes: int) -> ModelShapes:
    """The local shapes on one rank of a tensor-parallel group.

    As under the plans of transformers, each matrix of the layers is sharded, and so is an output matrix that is as large as the
    embedding; the embedding and all vectors are replicated.

    Args:
        model: the full shapes.
        processes: of the group.

    >>> model = ModelShapes((FSDPUnit(((6, 2), (6, 2), (2,))), FSDPUnit(((4, 2), (4,)))))
    >>> [unit.trained for unit in shard_matrices(model, 2).units]
    [((6, 2), (3, 2), (2,)), ((2, 2), (4,))]
    """

    def sharded(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(local_shape(shape, processes) if len(shape) > 1 else shape for shape in shapes)

    def output_sharded(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(sharded((shape,))[0] if shape in shapes[:index] else shape for index, shape in enumerate(shapes))

    root, *layers = model.units
    units = [FSDPUnit(sharded(layer.trained), sharded(layer.frozen)) for layer in layers]
    return attrs.evolve(model, units=(FSDPUnit(output_sharded(root.trained), output_sharded(root.frozen)), *units))


def shapes_from_counts(params: int, *, layers: int = 0, hidden: int = 0, heads: int = 0, vocabulary: int = 0) -> ModelShapes:
    """A model of which only these numbers are known: two matrices for the vocabulary, the rest divided evenly over the layers.

    Args:
        params: the number of parameters.
        layers: the number of blocks; 0 for a model without blocks, which is one unit.
        hidden: the hidden size.
        heads: of attention; 0 for one for each 128 of the hidden size.
        vocabulary: the vocabulary size; 0 to count embeddings like other parameters.

    Raises:
        ArgumentError: a number is below 0, or the embeddings are larger than the model.

    >>> model = shapes_from_counts(1_000, layers=2, hidden=10, vocabulary=20)
    >>> [unit.numel for unit in model.units]
    [400, 300, 300]
    """
    given = {"params": params, "layers": layers, "hidden": hidden, "heads": heads, "vocabulary": vocabulary}
    for name, value in given.items():
        if value < 0 or (name == "params" and not value):
            raise ArgumentError(f"{name}={value}: give a number above 0.")
    embedding = 2 * vocabulary * hidden
    if embedding > params:
        raise ArgumentError(
            f"{params} parameters are fewer than the {embedding} of two matrices of {vocabulary} tokens by {hidden}. "
            "Correct the numbers, or leave the vocabulary out."
        )
    per_layer = (params - embedding) // layers if layers else 0
    rest = params - embedding - layers * per_layer
    root = FSDPUnit(((vocabulary, hidden),) * 2 * bool(embedding) + _matrices(rest, hidden))
    return ModelShapes(
        (root, *[FSDPUnit(_matrices(per_layer, hidden))] * layers), layers, hidden, heads or -(-hidden // 128), vocabulary
    )


def _matrices(count: int, hidden: int) -> tuple[Shape, ...]:
    """So many parameters as square matrices, with a matrix and a vector for the rest."""
    if hidden == 0:
        return ((count,),)
    squares, rest = divmod(count, hidden * hidden)
    rows, rest = divmod(rest, hidden)
    return ((hidden, hidden),) * squares + ((rows, hidden),) * bool(rows) + ((rest,),) * bool(rest)


def shapes_from_module(
    module: nn.Module, units: Collection[str], *, layers: int = 0, hidden: int = 0, heads: int = 0, vocabulary: int = 0
) -> ModelShapes:
    """The dimensions of a module, which may be on the meta device.

    Args:
        module: is not changed.
        units: class names of the submodules that are FSDP units.
        layers: as in `ModelShapes`; so are the others.
        hidden: the hidden size.
        heads: of attention.
        vocabulary: the vocabulary size.

    Raises:
        ArgumentError: it has no parameters.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    >>> [unit.trained for unit in shapes_from_module(net, ["Linear"]).units]
    [(), ((4, 3), (4,)), ((1, 4), (1,))]
    """
    unit_of: dict[str, str] = {}  # from the names of modules to those of their units
    for name, child in module.named_modules():
        parent_unit = unit_of[name.rpartition(".")[0]] if name else ""
        unit_of[name] = name if type(child).__name__ in units else parent_unit
    trained: dict[str, list[Shape]] = {unit: [] for unit in unit_of.values()}  # first that of the root
    frozen: dict[str, list[Shape]] = {unit: [] for unit in trained}
    for name, parameter in module.named_parameters():
        shapes = trained if parameter.requires_grad else frozen
        shapes[unit_of[name.rpartition(".")[0]]].append(tuple(parameter.shape))
    if not any(trained.values()) and not any(frozen.values()):
        raise ArgumentError(f"{type(module).__name__} has no parameters: there is nothing to plan.")
    found = tuple(FSDPUnit(tuple(trained[name]), tuple(frozen[name])) for name in trained)
    return ModelShapes(found, layers, hidden, heads, vocabulary)
