"""Gradients with noise, and gradients without their means."""

from __future__ import annotations

from torch import Tensor

from fts.randomness import randn_like
from fts.transforms._checks import check_integer, check_number
from fts.transforms._scalars import new_count, real, times
from fts.transforms.scaling import ScheduleState
from fts.typing import Info, OptState, Params, Transform


def add_noise(eta: float, gamma: float, seed: int) -> Transform:
    """Add Gaussian noise of variance `eta / (1 + t) ** gamma` to the gradients of update t (0 first).

    Args:
        eta: the variance at the first update, not negative.
        gamma: how fast it decays, not negative; the paper uses 0.55.
        seed: an integer. The noise is a function of it, of t, and of the parameter's place in the gradients.

    Returns:
        A transform with `ScheduleState`.

    Raises:
        ArgumentError: `eta` or `gamma` is negative or not finite, or `seed` is no integer.

    >>> import torch
    >>> noisy = add_noise(0.01, 0.55, seed=0)
    >>> grads = {"w": torch.zeros(10_000)}
    >>> updates, _, _ = noisy.update(grads, noisy.init(grads), None)
    >>> round(updates["w"].std().item(), 2)
    0.1

    Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks", eq. 1.
    """
    check_number("add_noise: eta", eta)
    check_number("add_noise: gamma", gamma)
    check_integer("add_noise: seed", seed)

    def update(grads: Params, state: ScheduleState, params: Params | None) -> tuple[Params, OptState, Info]:
        deviation = (eta / (1.0 + real(state.step)) ** gamma) ** 0.5
        updates = {
            name: g + times(randn_like(g, seed, state.step.to(g.device), i), deviation)
            for i, (name, g) in enumerate(grads.items())
        }
        return updates, ScheduleState(state.step + 1), {}

    return Transform(lambda params: ScheduleState(new_count(params)), update, label=f"add_noise({eta}, {gamma}, seed={seed})")


def centralize() -> Transform:
    """Subtract from each unit's gradient its mean.

    A unit is one index of the first axis (an output of a linear or convolution layer). Tensors with fewer than two
    axes pass unchanged.

    Returns:
        A transform without state.

    >>> import torch
    >>> centralize().update({"w": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([5.0])}, (), None)[0]
    {'w': tensor([[-1.,  1.]]), 'b': tensor([5.])}

    Source: Yong, Huang, Hua, Zhang 2020, "Gradient Centralization: A New Optimization Technique for Deep Neural
    Networks", eq. 1.
    """

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        return {name: _centred(g) for name, g in grads.items()}, state, {}

    return Transform(lambda params: (), update, label="centralize()")


def _centred(grad: Tensor) -> Tensor:
    if grad.ndim < 2:
        return grad
    # a sum and not a mean, which torch does not weight by the sizes of shards
    total = grad.sum(dim=tuple(range(1, grad.ndim)), keepdim=True)
    return grad - total / (grad.numel() // max(grad.shape[0], 1))
