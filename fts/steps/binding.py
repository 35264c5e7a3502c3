"""Running a module at other tensors than its own, and giving it back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fts.dtensors import is_sharded, local, memory, point_to
from fts.errors import UnknownParameterError
from fts.state import TrainState
from fts.typing import Params


class Binding:
    """Where each tensor of a module lives, resolved once, so that a step exchanges tensors by plain assignments.

    Args:
        module: its structure must not change afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = tuple(module.modules())
        self.parameters = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        names = {id(tensor): name for name, tensor in (*self.parameters.items(), *buffers.items())}
        # a tied tensor has one name and several places
        self.parameter_places = _places([child._parameters for child in self.modules], names)
        self.buffer_places = _places([child._buffers for child in self.modules], names)
        # recurrent layers keep a second list of their weights, which must follow
        # `fully_shard` keeps its own view of each shard, so these Parameters must stay where they are
        self.sharded = is_cut(module)
        self.recurrent = [child for child in self.modules if isinstance(child, nn.RNNBase)]
        self.empty = [(child._buffers, key) for child in self.modules for key, tensor in child._buffers.items() if tensor is None]
        self._fitting: tuple[Any, Any, Any] = (None, None, None)
        self._settled = False

    def check(self, state: TrainState) -> None:
        """Raise UnknownParameterError where the state's names are not those of the module."""
        # a step keeps its dictionaries' keys, so it is enough to look again when a dictionary is exchanged
        current = (state.params.keys(), state.frozen.keys(), state.buffers.keys())
        if current == self._fitting:
            return
        have = self.parameters.keys() | self.buffer_places.keys()
        want = state.params.keys() | state.frozen.keys() | state.buffers.keys()
        if have != want:
            raise UnknownParameterError(
                f"The state does not fit the module {type(self.module).__name__}: the state lacks {sorted(have - want)[:5]}, the "
                f"module lacks {sorted(want - have)[:5]}. Create the state from the module that the loss runs."
            )
        self._fitting = tuple(frozenset(keys) for keys in current)  # type: ignore[assignment]

    def check_structure(self) -> None:
        """Raise UnknownParameterError where the first forward pass made tensors that no state knows."""
        if self._settled:
            return
        known = self.parameters.keys() | self.buffer_places.keys()
        found = dict(self.module.named_parameters()).keys() | dict(self.module.named_buffers()).keys()
        if made := sorted(found - known):
            for buffers, key in self.empty:
                buffers[key] = None
            raise UnknownParameterError(
                f"The forward pass of {type(self.module).__name__} made {made[:5]}, which the state does not hold, so they would "
                "be neither trained nor saved. Run one batch through the module before you create the state and the loss."
            )
        self._settled = True

    def has_hooks(self) -> bool:
        """Whether a parameter has hooks on its gradient, which only `loss.backward()` runs."""
        return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters.values())

    @contextmanager
    def exchange(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors (also traced or wrapped ones) in the places of parameters and buffers, until the block ends."""
        old = []
        try:
            for name, places in (*self.parameter_places.items(), *self.buffer_places.items()):
                tensor = tensors[name]
                for place, key in places:
                    old.append((place, key, place[key]))
                    place[key] = tensor
            for layer in self.recurrent:
                layer.__dict__["_flat_weights"] = _flat_weights(layer)
            yield
        finally:
            for place, key, tensor in old:
                place[key] = tensor
            for layer in self.recurrent:
                layer.__dict__["_flat_weights"] = _flat_weights(layer)

    @contextmanager
    def lend(self, params: Params, frozen: Params, buffers: Params) -> Iterator[None]:
        """Point the module's own Parameters at other storage, and put buffers in their places, until the block ends.

        The Parameter objects stay the same, so hooks on them, tied weights, and layers that hold them elsewhere work.
        Inside the block `.grad` of the trained ones starts empty. What is in the buffers' places at the end of the block
        is lost unless read by `get_buffers`.

        The parameters of a module under `fully_shard` are written instead where the state has others, and keep its values.
        """
        kept = []
        own_buffers = []
        try:
            for trained, tensors in ((True, params), (False, frozen)):
                for name, tensor in tensors.items():
                    parameter = self.parameters[name]
                    stays = self.sharded and is_sharded(parameter)
                    kept.append((parameter, None if stays else parameter.detach(), parameter.grad, parameter.requires_grad))
                    _hold(parameter, tensor, stays)
                    parameter.grad = None
                    if parameter.requires_grad is not trained:
                        parameter.requires_grad_(trained)
            for name, tensor in buffers.items():
                for place, key in self.buffer_places[name]:
                    own_buffers.append((place, key, place[key]))
                    place[key] = tensor
            yield
        finally:
            for place, key, tensor in own_buffers:
                place[key] = tensor
            for parameter, data, grad, requires_grad in kept:
                parameter.grad = None
                if data is not None:
                    point_to(parameter, data)
                if parameter.requires_grad is not requires_grad:
                    parameter.requires_grad_(requires_grad)
                if grad is not None:
                    parameter.grad = grad

    def get_buffers(self) -> Params:
        """The buffers that are in their places now; a forward may have put new tensors there."""
        return {name: places[0][0][places[0][1]].detach() for name, places in self.buffer_places.items()}

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Set the modules' `training` flags until the block ends.

        For evaluation every module is in eval mode. For training the root decides: if it is in train mode, submodules
        that the user put in eval mode (a frozen BatchNorm) stay so; if it is in eval mode, all are set to train.
        """
        if training and self.module.training:
            yield
            return
        changed = [child.__dict__ for child in self.modules if child.training is not training]
        try:
            for attributes in changed:
                attributes["training"] = training
            yield
        finally:
            for attributes in changed:
                attributes["training"] = not training


def is_cut(module: nn.Module) -> bool:
    """Whether `fully_shard` has cut the parameters of a module, or of a part of it.

    >>> is_cut(nn.Linear(1, 1))
    False
    """
    return any(hasattr(child, "set_requires_gradient_sync") for child in module.modules())


def _hold(parameter: Tensor, tensor: Tensor, stays: bool) -> None:
    """Let a parameter have the values of a tensor: in that one's memory, or, where it stays in its own, copied if need be."""
    if not stays:
        point_to(parameter, tensor)
    elif memory(parameter) != memory(tensor):
        local(parameter.detach()).copy_(local(tensor))


def _places(owners: list[dict[str, Any]], names: Mapping[int, str]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    places: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for owner in owners:
        for key, tensor in owner.items():
            if tensor is not None:
                places.setdefault(names[id(tensor)], []).append((owner, key))
    return places


def _flat_weights(layer: nn.RNNBase) -> list[Tensor | None]:
    return [layer._parameters.get(name) for name in layer._flat_weights_names]
