"""Two ways to gradients, with one meaning.

module   the state's tensors are lent to the module; `loss.backward()` fills `.grad` and the step drains it.
func     `torch.func.grad_and_value`; for graphs, vmap, and derivatives through the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import LossError
from fts.randomness import STEP, fold, seed_generators
from fts.state import TrainState
from fts.steps.binding import Binding
from fts.steps.collectives import Collectives, number_of
from fts.steps.losses import ModuleLoss, call_loss, name_of
from fts.steps.microbatches import PaddingBatch
from fts.steps.precision import autocast, scaled
from fts.steps.tracing import device_of, in_transform
from fts.steps.weighted_mean import Total, checked, sums_of, times, total_among, total_of, total_of_sums, weight_of
from fts.typing import Batch, LossFn, LossOutput, Metrics, Number, Params

HALF = (torch.bfloat16, torch.float16)


class LossAux(NamedTuple):
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
        among: the other processes that take the same step; None for a process that is alone.
        scale: what each loss is multiplied by before its backward pass, and so the gradients; None for nothing.
    """

    state: TrainState
    micro: Sequence[Batch]
    args: Sequence[Any]
    weigh_rows: bool
    among: Collectives | None = None
    scale: Tensor | None = None

    @property
    def single(self) -> bool:
        """Whether there is only one micro-batch."""
        return len(self.micro) == 1

    def seed(self, index: int, device: torch.device) -> None:
        """Seed the generators for a micro-batch; a graph or a vmapped step is seeded outside."""
        if not in_transform():
            seed_generators(fold(self.state.seed, STEP, int(self.state.step), number_of(index, self.among)), device)

    def run(self, forward: Callable[..., LossOutput], params: Any, index: int, device: torch.device) -> LossOutput:
        """The loss of a micro-batch, with its weight."""
        batch = self.micro[index]
        if isinstance(batch, PaddingBatch):
            output = forward(params, batch.batch, self.args, device)
            means = {name: value[0] if isinstance(value, tuple) else value for name, value in output.metrics.items()}
            return output._replace(weight=0, metrics={name: (mean, 0) for name, mean in means.items()})
        output = forward(params, batch, self.args, device)
        return output._replace(weight=weight_of(output, batch, self.weigh_rows))

    def total(self, outputs: Sequence[LossOutput]) -> Total:
        """Means over the micro-batches of all processes."""
        if self.among is None:
            return total_of(outputs, single=self.single)
        return total_among(outputs, self.among, device_of(self.state.params))


def module_engine(forward: Forward, work: Work, *, own_buffers: bool) -> tuple[LossAux, Params]:
    """Gradients by `loss.backward()` into the `.grad` of the module's own Parameters, or of leaves for a plain function."""
    state, binding = work.state, forward.binding
    if binding is None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.params.items()}
        total = _backward(forward, work, leaves)
        return LossAux(total.loss, total.weight, total.metrics, state.buffers), _drain(leaves, total, work.among)
    # where the forward pass may write the state, it still writes only what no checkpoint holds: caches and masks, which can
    # be large; running statistics are exchanged when the step has succeeded
    transient = state.layout.transient if own_buffers else ()
    buffers = {name: tensor if name in transient else tensor.clone() for name, tensor in state.buffers.items()}
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in buffers.items()} if work.among else {}
    leaves = {name: binding.parameters[name] for name in state.params}
    with binding.lend(state.params, state.frozen, buffers):
        total = _backward(forward, work, leaves)
        grads = _drain(leaves, total, work.among)
        if buffers:
            buffers = binding.get_buffers()
    binding.check_structure()
    if work.among is not None:
        # batch normalization writes its statistics without a new version
        kept = buffers.keys() - work.state.layout.transient
        written = {
            name: buffer
            for name, buffer in buffers.items()
            if name in kept or before[name] != (buffer.data_ptr(), buffer._version)
        }
        buffers |= work.among.same(written)
    return LossAux(total.loss, total.weight, total.metrics, buffers), grads


def _backward(forward: Forward, work: Work, leaves: Params) -> Total:
    device, among, last = device_of(work.state.params), work.among, len(work.micro) - 1
    run = forward if among is None else among.forward(forward)
    outputs: list[LossOutput] = []
    total, unit = None, None
    half = work.scale is not None or any(leaf.dtype == torch.float16 for leaf in leaves.values())
    narrow = half and not work.single
    late = among is not None and not half  # nobody waits before the backward pass; but 16 bits may not hold weighted gradients
    wait: Callable[[], Tensor] | None = None
    for index in range(len(work.micro)):
        work.seed(index, device)
        with (
            nullcontext() if torch.is_grad_enabled() else torch.enable_grad(),
            nullcontext() if among is None else among.exchanging(index == last),
        ):
            output = work.run(run, leaves, index, device)
            if not output.loss.requires_grad:
                raise LossError(
                    f"The loss of {name_of(forward.loss)} does not depend on any trained parameter: it has no gradient. "
                    "Look for .detach(), torch.no_grad() or .item() in the loss, or for parameters that are all frozen."
                )
            outputs.append(output._replace(loss=output.loss.detach()))
            if index == last and late:
                assert among is not None
                wait = among.summing(sums_of(outputs, device))
            elif index == last:
                total = work.total(outputs)
            factor = output.weight if late else _factor(work, output.weight, total)
            if narrow:
                assert factor is not None
                unit = _unit(work, output.weight, device) if unit is None else unit
                factor = factor / unit
            loss = scaled(output.loss, work.scale)
            if factor is None:
                loss.backward()  # type: ignore[no-untyped-call]
            elif among is not None or not _is_zero(factor):  # where several exchange gradients, nobody may stay away
                _weighted_backward(loss, factor, leaves, among)
    if wait is not None and among is not None:
        return total_of_sums(wait(), outputs, among.size)
    assert total is not None
    return total if unit is None or total.divisor is None else total._replace(divisor=total.divisor / unit)


def _unit(work: Work, weight: Number | None, device: torch.device) -> Number:
    """What the weights of micro-batches are divided by where numbers of tokens would make gradients in float16 overflow.

    It makes them about one share each: it is that of the first, on average over the processes, times their number.
    """
    assert weight is not None
    if work.among is not None:
        weight = work.among.sum(torch.as_tensor(weight, dtype=torch.float32, device=device)) / work.among.size
    return (weight.clamp(min=1) if isinstance(weight, Tensor) else max(weight, 1)) * len(work.micro)


def _factor(work: Work, weight: Number | None, total: Total | None) -> Number | None:
    """What a micro-batch's loss is multiplied by before its backward pass; None for nothing."""
    assert weight is not None
    if not work.single:
        return weight
    if work.among is None:
        return None
    assert total is not None
    return weight * work.among.size / total.weight  # since what is exchanged is the mean over the processes


def _is_zero(weight: Number) -> bool:
    """Whether a weight is known to be 0 without waiting for a device."""
    return checked(float(weight)) == 0 if not isinstance(weight, Tensor) or weight.is_cpu else False


def _weighted_backward(loss: Tensor, weight: Number, leaves: Params, among: Collectives | None) -> None:
    hooks: list[Any] = []
    # the gradients of a mean over no items are NaN, also times 0
    if isinstance(weight, Tensor) and not weight.is_cpu:  # which nobody may ask whether it is 0
        hooks = [
            leaf.register_hook(lambda grad: torch.where(weight == 0, 0.0, grad))  # type: ignore[no-untyped-call]
            for leaf in leaves.values()
        ]
    elif _is_zero(weight):
        carrier = None if among is None else among.carrier
        hooks = [node.register_prehook(_zeros) for node in _ends(loss) if node.variable is not carrier]
    try:
        (loss * weight).backward()  # type: ignore[no-untyped-call]
    finally:  # the leaves are the caller's own Parameters
        for hook in hooks:
            hook.remove()


def _zeros(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in grads)


def _ends(loss: Tensor) -> list[Any]:
    """Where a backward pass adds to gradients; also to those of parameters that `fully_shard` has gathered for it."""
    ends, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            ends.append(node)
        waiting += [after for after, _ in node.next_functions]
    return ends


def _drain(leaves: Params, total: Total, among: Collectives | None) -> Params:
    grads = {}
    for name, leaf in leaves.items():
        # torch.func gives zeros where a parameter was not used
        grads[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        leaf.grad = None
    if among is not None and not among.reduces:
        grads = among.mean(grads)
    if total.divisor is not None and (isinstance(total.divisor, Tensor) or total.divisor != 1):
        torch._foreach_div_(local_tensors(grads.values()), total.divisor)
    return grads


def func_engine(forward: Forward, work: Work) -> tuple[LossAux, Params]:
    """Gradients by `torch.func.grad_and_value`; pure, so it can be traced, vmapped and differentiated."""
    device, among = device_of(work.state.params), work.among
    outputs: list[LossOutput] = []
    grads: Params = {}
    buffers = work.state.buffers
    for index in range(len(work.micro)):
        work.seed(index, device)
        part, output, buffers = _grad_and_value(forward, work, buffers, index, device)
        outputs.append(output)
        if not work.single or among is not None:
            assert output.weight is not None
            weight = output.weight
            # what 16 bits hold may overflow when it is multiplied by a number of tokens, and sums of many lose the small ones
            part = {name: times(grad.float() if grad.dtype in HALF else grad, weight) for name, grad in part.items()}
        grads = {name: grads[name] + grad for name, grad in part.items()} if grads else part
    total = work.total(outputs)
    if among is not None:
        divisor = total.weight / among.size
        grads = {name: grad / divisor for name, grad in among.mean(grads).items()}
        buffers = among.same(buffers)
    elif total.divisor is not None:
        grads = {name: grad / total.divisor for name, grad in grads.items()}
    weight, params = total.weight, work.state.params
    grads = {name: grad if grad.dtype == params[name].dtype else grad.to(params[name].dtype) for name, grad in grads.items()}
    if not in_transform():
        grads = _separate(grads)
    elif not isinstance(weight, Tensor):  # vmap returns tensors only
        weight = torch.full((), float(weight), device=device)
    return LossAux(total.loss, weight, total.metrics, buffers), grads


def _grad_and_value(
    forward: Forward, work: Work, buffers: Params, index: int, device: torch.device
) -> tuple[Params, LossOutput, Params]:
    binding, frozen = forward.binding, work.state.frozen
    numbers: dict[str, Any] = {}

    def of_params(params: Params) -> tuple[Tensor, tuple[Params, Params]]:
        after = {name: tensor.clone() for name, tensor in buffers.items()}
        if binding is None:
            output = work.run(forward, params, index, device)
        else:
            with binding.exchange({**params, **frozen, **after}):
                output = work.run(forward, params, index, device)
                after = binding.get_buffers()
        # torch.func passes tensors out, and nothing else
        aux = {"loss": output.loss}
        _part("weight", output.weight, aux, numbers)
        for name, value in output.metrics.items():
            mean, own = value if isinstance(value, tuple) else (value, None)
            _part(f"mean of {name}", mean, aux, numbers)
            if own is not None:
                _part(f"weight of {name}", own, aux, numbers)
        numbers["names"] = [(name, isinstance(value, tuple)) for name, value in output.metrics.items()]
        return scaled(output.loss, work.scale), (aux, after)

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
