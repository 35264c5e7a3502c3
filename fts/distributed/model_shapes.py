"""How large a model is, as far as a plan of its training asks: shapes without tensors."""

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
        trained: the shapes of those that are trained.
        frozen: the shapes of the others.

    >>> FSDPUnit(trained=((3, 4), (4,))).count
    16
    """

    trained: tuple[Shape, ...]
    frozen: tuple[Shape, ...] = ()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All of them."""
        return self.trained + self.frozen

    @property
    def count(self) -> int:
        """How many numbers they have."""
        return elements(self.shapes)


@attrs.frozen
class ModelShapes:
    """The dimensions of a transformer, or of any model where `layers` is 0.

    Attributes:
        units: what is gathered as one under FSDP; first that of the model as a whole, with what lies outside of its layers.
        layers: how many blocks there are.
        hidden: the width between blocks.
        heads: of attention, in each block.
        vocabulary: how many tokens the model tells apart.
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


def elements(shapes: Iterable[Shape]) -> int:
    """How many numbers tensors of these shapes have.

    >>> elements([(2, 3), (5,), ()])
    12
    """
    return sum(map(math.prod, shapes))


def part(shape: Shape, processes: int) -> Shape:
    """What one of several processes has of a tensor that is cut along its first axis; the last ones may have less.

    >>> part((5, 3), 2), part((), 2)
    ((3, 3), ())
    """
    return (-(-shape[0] // processes), *shape[1:]) if shape else shape


def parts(shapes: Iterable[Shape], processes: int) -> tuple[Shape, ...]:
    """`part` of each."""
    return tuple(part(shape, processes) for shape in shapes)


def split(model: ModelShapes, processes: int) -> ModelShapes:
    """What one process of a tensor-parallel group has.

    As under the plans of transformers, it is a part of each matrix of the layers, and of an output matrix that is as large as the
    embedding; the embedding and all vectors are whole.

    Args:
        model: all of it.
        processes: of the group.

    >>> [unit.trained for unit in split(ModelShapes((FSDPUnit(((6, 2), (6, 2), (2,))), FSDPUnit(((4, 2), (4,))))), 2).units]
    [((6, 2), (3, 2), (2,)), ((2, 2), (4,))]
    """

    def cut(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(part(shape, processes) if len(shape) > 1 else shape for shape in shapes)

    def cut_output(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(cut((shape,))[0] if shape in shapes[:index] else shape for index, shape in enumerate(shapes))

    first, *layers = model.units
    outside = FSDPUnit(cut_output(first.trained), cut_output(first.frozen))
    return attrs.evolve(model, units=(outside, *(FSDPUnit(cut(layer.trained), cut(layer.frozen)) for layer in layers)))


def counted(params: int, *, layers: int = 0, hidden: int = 0, heads: int = 0, vocabulary: int = 0) -> ModelShapes:
    """A model of which only these numbers are known: two matrices for the vocabulary, the rest shared among the layers.

    Args:
        params: how many parameters it has.
        layers: how many blocks; 0 for a model without, which is one unit.
        hidden: the width between blocks.
        heads: of attention; 0 for one for each 128 of the width.
        vocabulary: how many tokens; 0 if embeddings are not to be told apart.

    Raises:
        ArgumentError: a number is below 0, or the embeddings are larger than the model.

    >>> model = counted(1_000, layers=2, hidden=10, vocabulary=20)
    >>> [unit.count for unit in model.units]
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
    of_layer = (params - embedding) // layers if layers else 0
    of_root = params - embedding - layers * of_layer
    root = FSDPUnit(((vocabulary, hidden),) * 2 * bool(embedding) + _matrices(of_root, hidden))
    return ModelShapes(
        (root, *[FSDPUnit(_matrices(of_layer, hidden))] * layers), layers, hidden, heads or -(-hidden // 128), vocabulary
    )


def _matrices(count: int, hidden: int) -> tuple[Shape, ...]:
    """So many parameters as square matrices, with a matrix and a vector for the rest."""
    if hidden == 0:
        return ((count,),)
    squares, rest = divmod(count, hidden * hidden)
    rows, rest = divmod(rest, hidden)
    return ((hidden, hidden),) * squares + ((rows, hidden),) * bool(rows) + ((rest,),) * bool(rest)


def of_module(
    module: nn.Module, units: Collection[str], *, layers: int = 0, hidden: int = 0, heads: int = 0, vocabulary: int = 0
) -> ModelShapes:
    """The dimensions of a module, which may lie on torch's meta device.

    Args:
        module: is not changed.
        units: names of the classes of its submodules that FSDP gathers as one.
        layers: as in `ModelShapes`; so are the others.
        hidden: the width between blocks.
        heads: of attention.
        vocabulary: how many tokens.

    Raises:
        ArgumentError: it has no parameters.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    >>> [unit.trained for unit in of_module(net, ["Linear"]).units]
    [(), ((4, 3), (4,)), ((1, 4), (1,))]
    """
    owner: dict[str, str] = {}  # from the names of modules to those of their units
    for name, child in module.named_modules():
        above = owner[name.rpartition(".")[0]] if name else ""
        owner[name] = name if type(child).__name__ in units else above
    trained: dict[str, list[Shape]] = {unit: [] for unit in owner.values()}  # first that of the module itself
    frozen: dict[str, list[Shape]] = {unit: [] for unit in trained}
    for name, parameter in module.named_parameters():
        kind = trained if parameter.requires_grad else frozen
        kind[owner[name.rpartition(".")[0]]].append(tuple(parameter.shape))
    if not any(trained.values()) and not any(frozen.values()):
        raise ArgumentError(f"{type(module).__name__} has no parameters: there is nothing to plan.")
    found = tuple(FSDPUnit(tuple(trained[name]), tuple(frozen[name])) for name in trained)
    return ModelShapes(found, layers, hidden, heads, vocabulary)
