"""Optimizers written with `elementwise`, `per_tensor` and `optimizer`, one for each thing that a rule may need."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts import transforms as tx
from fts.transforms._checks import check_decays, format_label
from fts.transforms._learning_rates import Rate
from fts.transforms._masks import Mask
from fts.typing import Params, Transform


def contributing() -> dict[str, Any]:
    """What the example in CONTRIBUTING.md defines."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.split("### A new transform")[1].split("```python\n")[1].split("```")[0]
    names = {"NamedTuple": NamedTuple, "Params": Params, "Tensor": Tensor, "Transform": Transform, "Rate": Rate}
    names |= {"Mask": Mask, "check_decays": check_decays, "format_label": format_label}
    names |= {"elementwise": tx.elementwise, "optimizer": tx.optimizer}
    exec(code, names)
    return names


lion = contributing()["lion"]


class FactoredState(NamedTuple):
    """Running means of squares: for matrices of their rows and columns, else of all numbers."""

    step: Tensor
    row: Params
    col: Params
    full: Params


def scale_by_factored_rms(decay: float = 0.8, eps: float = 1e-8) -> Transform:
    """Adafactor's scaling: a state of other shapes than the parameters', and branches on the shape."""

    def rule(grad: Tensor, step: Any, row: Tensor, col: Tensor, full: Tensor) -> tuple[Tensor, ...]:
        beta, square = 1 - step**-decay, grad * grad + eps
        if grad.ndim < 2:
            full = beta * full + (1 - beta) * square
            update = grad / full.sqrt()
        else:
            row = beta * row + (1 - beta) * square.mean(-1)
            col = beta * col + (1 - beta) * square.mean(-2)
            factor = row / row.mean(-1, keepdim=True)
            update = grad / (factor[..., None] * col[..., None, :]).sqrt()
        return update / update.square().mean().sqrt().clamp(min=1.0), row, col, full

    def start(shape: Any, ndim: range) -> Any:
        return lambda p: p.new_zeros(shape(p.shape)) if p.ndim in ndim else p.new_zeros(0)

    init = {
        "row": start(lambda shape: shape[:-1], range(2, 9)),
        "col": start(lambda shape: (*shape[:-2], shape[-1]), range(2, 9)),
        "full": start(lambda shape: shape, range(2)),
    }
    return tx.per_tensor(rule, FactoredState, init=init, label=f"scale_by_factored_rms({decay})")


def orthogonalize(steps: int = 5, eps: float = 1e-7) -> Transform:
    """Muon's Newton-Schulz iteration: matrix products, without a state."""

    def rule(grad: Tensor) -> Tensor:
        if grad.ndim != 2:
            return grad
        x = grad / (grad.square().sum() + eps).sqrt()
        for _ in range(steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x

    return tx.per_tensor(rule, label=f"orthogonalize({steps})")


def muon(lr: Rate, weight_decay: float = 0.0) -> Transform:
    """An optimizer whose scaling is a chain without a counter."""
    return tx.optimizer("muon", tx.chain(tx.trace(0.95, nesterov=True), orthogonalize()), lr, weight_decay=weight_decay)


class ScheduleFreeState(NamedTuple):
    """The sum of the weights of the average, which all parameters share, and the sequence that gradients move."""

    step: Tensor
    weight_sum: Tensor
    z: Params


def schedule_free_sgd(lr: Rate, beta: float = 0.9) -> Transform:
    """Needs the parameters, starts at them, and has numbers that are computed once for all."""

    def shared(grads: Params, state: ScheduleFreeState, params: Params | None) -> dict[str, Any]:
        rate = lr(state.step) if callable(lr) else lr
        total = state.weight_sum + rate**2
        return {"lr": rate, "weight_sum": total, "share": rate**2 / total}

    def rule(grad: Tensor, param: Tensor, z: Tensor, lr: Any, share: Any) -> tuple[Tensor, Tensor]:
        average = (param - (1 - beta) * z) / beta
        z = z - lr * grad
        average = (1 - share) * average + share * z
        return beta * average + (1 - beta) * z - param, z

    init = {"z": torch.clone, "weight_sum": 0.0}
    label = f"schedule_free_sgd({beta})"
    return tx.elementwise(rule, ScheduleFreeState, init=init, shared=shared, report=("lr",), label=label)


class AdanState(NamedTuple):
    """Running means of gradients, of their differences and of squares, and the last gradients."""

    step: Tensor
    mu: Params
    diff: Params
    nu: Params
    last: Params


def scale_by_adan(b1: float = 0.98, b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8) -> Transform:
    """Keeps the gradients themselves, and has a condition on the step."""

    def rule(grad: Tensor, step: Any, mu: Tensor, diff: Tensor, nu: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        change = torch.where(step > 1, grad - last, torch.zeros_like(grad))
        mu = b1 * mu + (1 - b1) * grad
        diff = b2 * diff + (1 - b2) * change
        nu = b3 * nu + (1 - b3) * (grad + b2 * change) ** 2
        m, d, v = (tx.bias_correction(mean, b, step) for mean, b in ((mu, b1), (diff, b2), (nu, b3)))
        return (m + b2 * d) / (v.sqrt() + eps), mu, diff, nu, grad

    return tx.elementwise(rule, AdanState, label="scale_by_adan()")


EXAMPLES = [
    lion(tx.cosine_schedule(0.1, warmup_steps=2, total_steps=5), weight_decay=0.1),
    muon(0.1, weight_decay=0.1),
    scale_by_factored_rms(),
    schedule_free_sgd(tx.constant_schedule(0.1)),
    scale_by_adan(),
]
