"""Two ways to gradients, with one meaning.

module   the state's tensors are lent to the module; `loss.backward()` fills `.grad` and the step drains it.
func     `torch.func.grad_and_value`; for graphs, vmap, and derivatives through the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from fts.errors import LossError
from fts.randomness import STEP, fold, seed_generators
from fts.state import TrainState
from fts.steps.binding import Binding
from fts.steps.losses import ModuleLoss, call_loss, name_of
from fts.steps.precision import autocast
from fts.steps.tracing import device_of, in_transform
from fts.steps.weighing import Total, checked, times, total_of, weight_of
from fts.typing import Batch, LossFn, LossOutput, Metrics, Number, Params


class Value(NamedTuple):
    """What a loss gave on a whole batch.

    Attributes:
        loss: 0-d tensor, the weighted mean over micro-batches.
        weight: the sum of the micro-batches' weights.
        metrics: the loss function's own metrics, averaged like the loss; 0-d tensors.
        buffers: the module's buffers after the forward pass.
    """

    loss: Tensor
    weight: Number
    metrics: Metrics
    buffers: Params


@attrs.frozen(eq=False)
class Forward:
    """A loss and how to run it: under autocast to `dtype`, on the module of `binding` if it is a module's."""

    loss: LossFn | ModuleLoss
    dtype: torch.dtype | None
    binding: Binding | None

    def __call__(self, params: Any, batch: Batch, args: Sequence[Any], device: torch.device) -> LossOutput:
        with autocast(device, self.dtype):
            return call_loss(self.loss, params, batch, *args)


class Work(NamedTuple):  # which a graph can build
    """One batch to be differentiated at a state.

    Attributes:
        state: where.
        micro: the micro-batches.
        args: what the loss gets behind each of them.
        weigh_rows: whether a micro-batch without a weight of its own weighs its rows, else 1.
    """

    state: TrainState
    micro: Sequence[Batch]
    args: Sequence[Any]
    weigh_rows: bool

    @property
    def single(self) -> bool:
        """Whether there is only one micro-batch."""
        return len(self.micro) == 1

    def seed(self, index: int, device: torch.device) -> None:
        """Seed the generators for a micro-batch; a graph or a vmapped step is seeded outside."""
        if not in_transform():
            seed_generators(fold(self.state.seed, STEP, int(self.state.step), index), device)


def module_engine(forward: Forward, work: Work, *, own_buffers: bool) -> tuple[Value, Params]:
    """Gradients by `loss.backward()` into the `.grad` of the module's own Parameters, or of leaves for a plain function."""
    state, binding = work.state, forward.binding
    if binding is None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.params.items()}
        total = _backward(forward, work, leaves)
        return Value(total.loss, total.weight, total.metrics, state.buffers), _drain(leaves, total)
    # where the forward pass may write the state, it still writes only what no checkpoint holds: caches and masks, which can
    # be large; running statistics are exchanged when the step has succeeded
    transient = state.layout.transient if own_buffers else ()
    buffers = {name: tensor if name in transient else tensor.clone() for name, tensor in state.buffers.items()}
    leaves = {name: binding.parameters[name] for name in state.params}
    with binding.lend(state.params, state.frozen, buffers):
        total = _backward(forward, work, leaves)
        grads = _drain(leaves, total)
        if buffers:
            buffers = binding.get_buffers()
    binding.check_structure()
    return Value(total.loss, total.weight, total.metrics, buffers), grads


def _backward(forward: Forward, work: Work, leaves: Params) -> Total:
    device = device_of(work.state.params)
    outputs: list[tuple[LossOutput, Number]] = []
    for index, batch in enumerate(work.micro):
        work.seed(index, device)
        with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
            output = forward(leaves, batch, work.args, device)
            weight = weight_of(output, batch, work.weigh_rows)
            if not output.loss.requires_grad:
                raise LossError(
                    f"The loss of {name_of(forward.loss)} does not depend on any trained parameter: it has no gradient. "
                    "Look for .detach(), torch.no_grad() or .item() in the loss, or for parameters that are all frozen."
                )
            if work.single:
                output.loss.backward()  # type: ignore[no-untyped-call]
            elif not _is_zero(weight):
                _weighted_backward(output.loss, weight, leaves)
        outputs.append((output._replace(loss=output.loss.detach()), weight))
    return total_of(outputs, single=work.single)


def _is_zero(weight: Number) -> bool:
    """Whether a weight is known to be 0 without waiting for a device."""
    return checked(float(weight)) == 0 if not isinstance(weight, Tensor) or weight.is_cpu else False


def _weighted_backward(loss: Tensor, weight: Number, leaves: Params) -> None:
    hooks = []
    if isinstance(weight, Tensor) and not weight.is_cpu:
        # it may be 0, and then the gradients of a mean over no items are NaN
        hooks = [
            leaf.register_hook(lambda grad: torch.where(weight == 0, 0.0, grad))  # type: ignore[no-untyped-call]
            for leaf in leaves.values()
        ]
    try:
        (loss * weight).backward()  # type: ignore[no-untyped-call]
    finally:  # the leaves are the caller's own Parameters
        for hook in hooks:
            hook.remove()


def _drain(leaves: Params, total: Total) -> Params:
    grads = {}
    for name, leaf in leaves.items():
        # torch.func gives zeros where a parameter was not used
        grads[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        leaf.grad = None
    if total.divisor is not None:
        torch._foreach_div_(list(grads.values()), total.divisor)
    return grads


def func_engine(forward: Forward, work: Work) -> tuple[Value, Params]:
    """Gradients by `torch.func.grad_and_value`; pure, so it can be traced, vmapped and differentiated."""
    device = device_of(work.state.params)
    outputs: list[tuple[LossOutput, Number]] = []
    grads: Params = {}
    buffers = work.state.buffers
    for index, batch in enumerate(work.micro):
        work.seed(index, device)
        part, output, buffers = _grad_and_value(forward, work, buffers, batch, device)
        weight = output.weight
        assert weight is not None
        outputs.append((output, weight))
        if not work.single:
            part = {name: times(grad, weight) for name, grad in part.items()}
        grads = {name: grads[name] + grad for name, grad in part.items()} if grads else part
    total = total_of(outputs, single=work.single)
    if total.divisor is not None:
        grads = {name: grad / total.divisor for name, grad in grads.items()}
    weight = total.weight
    if not in_transform():
        grads = _separate(grads)
    elif not isinstance(weight, Tensor):  # vmap returns tensors only
        weight = torch.full((), float(weight), device=device)
    return Value(total.loss, weight, total.metrics, buffers), grads


def _grad_and_value(
    forward: Forward, work: Work, buffers: Params, batch: Batch, device: torch.device
) -> tuple[Params, LossOutput, Params]:
    binding, frozen = forward.binding, work.state.frozen
    numbers: dict[str, Any] = {}

    def of_params(params: Params) -> tuple[Tensor, tuple[Params, Params]]:
        after = {name: tensor.clone() for name, tensor in buffers.items()}
        if binding is None:
            output = forward(params, batch, work.args, device)
        else:
            with binding.exchange({**params, **frozen, **after}):
                output = forward(params, batch, work.args, device)
                after = binding.get_buffers()
        # torch.func passes tensors out, and nothing else
        aux = {"loss": output.loss}
        _part("weight", weight_of(output, batch, work.weigh_rows), aux, numbers)
        for name, value in output.metrics.items():
            mean, own = value if isinstance(value, tuple) else (value, None)
            _part(f"mean of {name}", mean, aux, numbers)
            if own is not None:
                _part(f"weight of {name}", own, aux, numbers)
        numbers["names"] = [(name, isinstance(value, tuple)) for name, value in output.metrics.items()]
        return output.loss, (aux, after)

    grads, (_, (aux, after)) = torch.func.grad_and_value(of_params, has_aux=True)(work.state.params)
    found = {**numbers, **aux}
    metrics = {
        name: (found[f"mean of {name}"], found[f"weight of {name}"]) if weighted else found[f"mean of {name}"]
        for name, weighted in numbers["names"]
    }
    return grads, LossOutput(aux["loss"], found["weight"], metrics), after


def _part(key: str, value: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    (tensors if isinstance(value, Tensor) else numbers)[key] = value


def _separate(grads: Params) -> Params:
    # torch.func may give one tensor to two parameters, or an expanded one; what follows may write in place
    seen: set[int] = set()
    separate = {}
    for name, grad in grads.items():
        memory = grad.untyped_storage()
        shared = memory.data_ptr() in seen or memory.nbytes() < grad.nbytes
        seen.add(memory.data_ptr())
        separate[name] = grad.clone(memory_format=torch.contiguous_format) if shared else grad
    return separate
