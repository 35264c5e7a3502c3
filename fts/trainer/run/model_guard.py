"""Checks of what callbacks do to the model during a run."""

from __future__ import annotations

import torch
from torch import nn

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.module_binding import ModuleBinding


class ModelGuard:
    """Copies what callbacks wrote into a model to the state, and refuses changes that a running step cannot follow.

    Args:
        model: the one that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        binding = ModuleBinding(model)
        self.places = [
            (name, binding.parameters[name], place, key)
            for name, places in binding.parameter_slots.items()
            for place, key in places
        ]

    def check(self, state: TrainState) -> None:
        """Compare the model with the state that it shares its tensors with.

        Args:
            state: gets the values of Parameters whose `.data` was replaced; it shares what was written in place.

        Raises:
            ArgumentError: a Parameter was replaced, frozen or unfrozen.
        """
        for name, parameter, place, key in self.places:
            if place.get(key) is not parameter:
                raise ArgumentError(
                    f"The Parameter {name!r} was replaced while the model is trained, so that its updates would be lost. Write "
                    "into it in place, under torch.no_grad()."
                )
            trained = name in state.params
            if parameter.requires_grad is not trained:
                raise ArgumentError(
                    f"requires_grad of {name!r} was set to {parameter.requires_grad} while the model is trained, but what is "
                    "trained is fixed when a run begins. Set it before train(), zero the gradient in on_pre_optimizer_step, or "
                    "pass Trainer(step=tx.masked(...))."
                )
            tensor = state.params[name] if trained else state.frozen[name]
            if parameter.data_ptr() != tensor.data_ptr() and parameter.shape == tensor.shape:
                with torch.no_grad():
                    tensor.copy_(parameter)
                parameter.data = tensor
