"""Running a module with the tensors of a state, and restoring its own afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fts.dtensors import is_dtensor, local_storage_ptr, set_data, to_local
from fts.errors import UnknownParameterError
from fts.state import TrainState
from fts.typing import Params


class ModuleBinding:
    """The places of a module's parameters and buffers, resolved once, so that a step swaps tensors by plain assignments.

    Args:
        module: its structure must not change afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = tuple(module.modules())
        self.parameters = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        names = {id(tensor): name for name, tensor in (*self.parameters.items(), *buffers.items())}
        # a tied tensor has one name and several slots
        self.parameter_slots = _slots([child._parameters for child in self.modules], names)
        self.buffer_slots = _slots([child._buffers for child in self.modules], names)
        # `fully_shard` keeps its own view of each shard, so these Parameters must keep their memory
        self.fully_sharded = uses_fully_shard(module)
        # recurrent layers keep a second list of their weights, which must be updated too
        self.recurrent = [child for child in self.modules if isinstance(child, nn.RNNBase)]
        self.empty_buffers = [
            (child._buffers, key) for child in self.modules for key, tensor in child._buffers.items() if tensor is None
        ]
        self._checked_keys: tuple[Any, Any, Any] = (None, None, None)
        self._structure_checked = False

    def check(self, state: TrainState) -> None:
        """Raise UnknownParameterError unless the state has the names of the module."""
        # a step keeps its dictionaries' keys, so the check is only repeated when a dictionary is replaced
        current = (state.params.keys(), state.frozen.keys(), state.buffers.keys())
        if current == self._checked_keys:
            return
        module_names = self.parameters.keys() | self.buffer_slots.keys()
        state_names = state.params.keys() | state.frozen.keys() | state.buffers.keys()
        if module_names != state_names:
            raise UnknownParameterError(
                f"The state does not fit the module {type(self.module).__name__}: the state lacks "
                f"{sorted(module_names - state_names)[:5]}, the module lacks {sorted(state_names - module_names)[:5]}. "
                "Create the state from the module that the loss runs."
            )
        self._checked_keys = tuple(frozenset(keys) for keys in current)  # type: ignore[assignment]

    def check_structure(self) -> None:
        """Raise UnknownParameterError if the first forward pass registered tensors that the state does not have."""
        if self._structure_checked:
            return
        known = self.parameters.keys() | self.buffer_slots.keys()
        found = dict(self.module.named_parameters()).keys() | dict(self.module.named_buffers()).keys()
        if added := sorted(found - known):
            for buffers, key in self.empty_buffers:
                buffers[key] = None
            raise UnknownParameterError(
                f"The forward pass of {type(self.module).__name__} registered {added[:5]}, which the state does not have: "
                "they would be neither trained nor saved. Run one batch through the module before creating state and loss."
            )
        self._structure_checked = True

    def has_gradient_hooks(self) -> bool:
        """Whether a parameter has gradient hooks, which only `loss.backward()` runs."""
        return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters.values())

    @contextmanager
    def reparametrize(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters and buffers by other tensors (also traced or wrapped ones) until the block ends."""
        old = []
        try:
            for name, slots in (*self.parameter_slots.items(), *self.buffer_slots.items()):
                tensor = tensors[name]
                for owner, key in slots:
                    old.append((owner, key, owner[key]))
                    owner[key] = tensor
            for layer in self.recurrent:
                layer.__dict__["_flat_weights"] = _flat_weights(layer)
            yield
        finally:
            for owner, key, tensor in old:
                owner[key] = tensor
            for layer in self.recurrent:
                layer.__dict__["_flat_weights"] = _flat_weights(layer)

    @contextmanager
    def swap_parameters(self, params: Params, frozen: Params, buffers: Params) -> Iterator[None]:
        """Point the module's own Parameters at other storage, and replace its buffers, until the block ends.

        The Parameter objects stay the same, so hooks on them, tied weights, and layers that keep other references to them
        work. Inside the block `.grad` of the trained ones starts as None. Read the buffers by `get_buffers` before the block
        ends; afterwards they are lost.

        The parameters of a module under `fully_shard` keep their memory: values that differ are copied into it, and remain
        there.
        """
        own_parameters = []
        own_buffers = []
        try:
            for trained, tensors in ((True, params), (False, frozen)):
                for name, tensor in tensors.items():
                    parameter = self.parameters[name]
                    keeps_memory = self.fully_sharded and is_dtensor(parameter)
                    own_parameters.append(
                        (parameter, None if keeps_memory else parameter.detach(), parameter.grad, parameter.requires_grad)
                    )
                    _assign(parameter, tensor, keeps_memory)
                    parameter.grad = None
                    if parameter.requires_grad is not trained:
                        parameter.requires_grad_(trained)
            for name, tensor in buffers.items():
                for owner, key in self.buffer_slots[name]:
                    own_buffers.append((owner, key, owner[key]))
                    owner[key] = tensor
            yield
        finally:
            for owner, key, tensor in own_buffers:
                owner[key] = tensor
            for parameter, data, grad, requires_grad in own_parameters:
                parameter.grad = None
                if data is not None:
                    set_data(parameter, data)
                if parameter.requires_grad is not requires_grad:
                    parameter.requires_grad_(requires_grad)
                if grad is not None:
                    parameter.grad = grad

    def get_buffers(self) -> Params:
        """The current buffers of the module; a forward pass may have replaced them by new tensors."""
        return {name: slots[0][0][slots[0][1]].detach() for name, slots in self.buffer_slots.items()}

    @contextmanager
    def training_mode(self, training: bool) -> Iterator[None]:
        """Set the modules' `training` flags until the block ends.

        For evaluation every module is in eval mode. For training the root decides: if it is in train mode, submodules
        that the user put in eval mode (a frozen BatchNorm) stay in it; if it is in eval mode, all are set to train mode.
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


def uses_fully_shard(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module or one of its submodules.

    >>> uses_fully_shard(nn.Linear(1, 1))
    False
    """
    return any(hasattr(child, "set_requires_gradient_sync") for child in module.modules())


def _assign(parameter: Tensor, tensor: Tensor, keeps_memory: bool) -> None:
    """Give a parameter the values of a tensor: by sharing its memory, or by a copy where the parameter keeps its own."""
    if not keeps_memory:
        set_data(parameter, tensor)
    elif local_storage_ptr(parameter) != local_storage_ptr(tensor):
        to_local(parameter.detach()).copy_(to_local(tensor))


def _slots(owners: list[dict[str, Any]], names: Mapping[int, str]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    slots: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for owner in owners:
        for key, tensor in owner.items():
            if tensor is not None:
                slots.setdefault(names[id(tensor)], []).append((owner, key))
    return slots


def _flat_weights(layer: nn.RNNBase) -> list[Tensor | None]:
    return [layer._parameters.get(name) for name in layer._flat_weights_names]
