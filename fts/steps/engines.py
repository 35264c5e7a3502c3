"""The two gradient engines; both compute the same.

module   the module runs with the state's tensors; `loss.backward()` fills `.grad`, which the step reads and clears.
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
from fts.randomness import seed_microbatch
from fts.state import TrainState
from fts.steps.collectives import Collectives, global_microbatch_index
from fts.steps.losses import ModuleLoss, call_loss, function_name
from fts.steps.microbatches import PaddingBatch
from fts.steps.module_binding import ModuleBinding
from fts.steps.precision import autocast, scale_loss
from fts.steps.tracing import device_of, is_tracing
from fts.steps.weighted_mean import (
    WeightedMean,
    all_reduce_weighted_mean,
    check_weight,
    mean_from_sums,
    microbatch_weight,
    multiply_by_weight,
    weighted_mean,
    weighted_sums,
)
from fts.typing import Batch, LossFn, LossOutput, Metrics, Number, Params

HALF = (torch.bfloat16, torch.float16)


class LossAux(NamedTuple):
    """The auxiliary output of a gradient function, for a full batch.

    Attributes:
        loss: 0-d tensor, the weighted mean over micro-batches.
        weight: the sum of the micro-batches' weights.
        metrics: of the loss function, averaged like the loss; 0-d tensors.
        buffers: the module's buffers after the forward pass.
    """

    loss: Tensor
    weight: Number
    metrics: Metrics
    buffers: Params


@attrs.frozen(eq=False)
class ForwardPass:
    """A loss and how to run it: under autocast to `dtype`, and with the module of `binding` if it is a module loss."""

    loss: LossFn | ModuleLoss
    dtype: torch.dtype | None
    binding: ModuleBinding | None

    def __call__(self, params: Any, batch: Batch, args: Sequence[Any], device: torch.device) -> LossOutput:
        with autocast(device, self.dtype):
            return call_loss(self.loss, params, batch, *args)


class GradientInputs(NamedTuple):  # a type that can be built inside a graph
    """What a gradient engine needs: the state, and a batch as micro-batches.

    Attributes:
        state: whose parameters the loss is differentiated at.
        microbatches: of this rank.
        args: further arguments of the loss, after the batch.
        weight_by_batch_size: the weight of a micro-batch whose loss returns none: its batch size, or else 1.
        collectives: of the ranks that take the same step; None for a single process.
        scale: the loss scale, which multiplies each loss, and so the gradients; None for no scaling.
    """

    state: TrainState
    microbatches: Sequence[Batch]
    args: Sequence[Any]
    weight_by_batch_size: bool
    collectives: Collectives | None = None
    scale: Tensor | None = None

    @property
    def single(self) -> bool:
        """Whether there is only one micro-batch."""
        return len(self.microbatches) == 1

    def seed(self, index: int, device: torch.device) -> None:
        """Seed the generators for a micro-batch; a graph or a vmapped step is seeded by its caller."""
        if not is_tracing():
            index = global_microbatch_index(index, self.collectives)
            seed_microbatch(self.state.seed, int(self.state.step), index, device)

    def run(self, forward: Callable[..., LossOutput], params: Any, index: int, device: torch.device) -> LossOutput:
        """The loss of a micro-batch, and its weight."""
        batch = self.microbatches[index]
        if isinstance(batch, PaddingBatch):
            output = forward(params, batch.batch, self.args, device)
            means = {name: value[0] if isinstance(value, tuple) else value for name, value in output.metrics.items()}
            return output._replace(weight=0, metrics={name: (mean, 0) for name, mean in means.items()})
        output = forward(params, batch, self.args, device)
        return output._replace(weight=microbatch_weight(output, batch, self.weight_by_batch_size))

    def total(self, outputs: Sequence[LossOutput]) -> WeightedMean:
        """Weighted means over the micro-batches of all ranks."""
        if self.collectives is None:
            return weighted_mean(outputs, single=self.single)
        return all_reduce_weighted_mean(outputs, self.collectives, device_of(self.state.params))


def module_engine(forward: ForwardPass, inputs: GradientInputs, *, inplace_buffers: bool) -> tuple[LossAux, Params]:
    """Gradients by `loss.backward()` into the `.grad` of the module's own Parameters, or of leaves for a plain function."""
    state, binding = inputs.state, forward.binding
    if binding is None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.params.items()}
        total = _backward(forward, inputs, leaves)
        return LossAux(total.loss, total.weight, total.metrics, state.buffers), _collect_gradients(
            leaves, total, inputs.collectives
        )
    # in-place writes are allowed for non-persistent buffers only: caches and masks, which can be large. Running statistics are
    # copied, and replaced when the step has succeeded
    not_copied = state.metadata.non_persistent if inplace_buffers else ()
    buffers = {name: tensor if name in not_copied else tensor.clone() for name, tensor in state.buffers.items()}
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in buffers.items()} if inputs.collectives else {}
    leaves = {name: binding.parameters[name] for name in state.params}
    with binding.swap_parameters(state.params, state.frozen, buffers):
        total = _backward(forward, inputs, leaves)
        grads = _collect_gradients(leaves, total, inputs.collectives)
        if buffers:
            buffers = binding.get_buffers()
    binding.check_structure()
    if inputs.collectives is not None:
        # BatchNorm writes its statistics without a new tensor version
        persistent = buffers.keys() - inputs.state.metadata.non_persistent
        written = {
            name: buffer
            for name, buffer in buffers.items()
            if name in persistent or before[name] != (buffer.data_ptr(), buffer._version)
        }
        buffers |= inputs.collectives.sync_buffers(written)
    return LossAux(total.loss, total.weight, total.metrics, buffers), grads


def _backward(forward: ForwardPass, inputs: GradientInputs, leaves: Params) -> WeightedMean:
    device, collectives, last = device_of(inputs.state.params), inputs.collectives, len(inputs.microbatches) - 1
    run = forward if collectives is None else collectives.wrap_forward(forward)
    outputs: list[LossOutput] = []
    total, unit = None, None
    is_fp16 = inputs.scale is not None or any(leaf.dtype == torch.float16 for leaf in leaves.values())
    divides_weights = is_fp16 and not inputs.single
    # the means are then all-reduced during the backward pass, so that no rank waits before it; in float16 weights may overflow
    reduces_late = collectives is not None and not is_fp16
    wait: Callable[[], Tensor] | None = None
    for index in range(len(inputs.microbatches)):
        inputs.seed(index, device)
        with (
            nullcontext() if torch.is_grad_enabled() else torch.enable_grad(),
            nullcontext() if collectives is None else collectives.gradient_sync(index == last),
        ):
            output = inputs.run(run, leaves, index, device)
            if not output.loss.requires_grad:
                raise LossError(
                    f"The loss of {function_name(forward.loss)} does not depend on any trained parameter: it has no gradient. "
                    "Look for .detach(), torch.no_grad() or .item() in the loss, or for parameters that are all frozen."
                )
            outputs.append(output._replace(loss=output.loss.detach()))
            if index == last and reduces_late:
                assert collectives is not None
                wait = collectives.all_reduce_async(weighted_sums(outputs, device))
            elif index == last:
                total = inputs.total(outputs)
            factor = output.weight if reduces_late else _loss_factor(inputs, output.weight, total)
            if divides_weights:
                assert factor is not None
                unit = _weight_unit(inputs, output.weight, device) if unit is None else unit
                factor = factor / unit
            loss = scale_loss(output.loss, inputs.scale)
            if factor is None:
                loss.backward()  # type: ignore[no-untyped-call]
            elif collectives is not None or not _is_zero(factor):  # with collectives, no rank may skip a backward pass
                _weighted_backward(loss, factor, leaves, collectives)
    if wait is not None and collectives is not None:
        return mean_from_sums(wait(), outputs, collectives.size)
    assert total is not None
    return total if unit is None or total.divisor is None else total._replace(divisor=total.divisor / unit)


def _weight_unit(inputs: GradientInputs, weight: Number | None, device: torch.device) -> Number:
    """A divisor of the micro-batches' weights, for float16, where weights such as numbers of tokens would overflow.

    It is the weight of the first micro-batch (the mean over all ranks), times the number of micro-batches.
    """
    assert weight is not None
    if inputs.collectives is not None:
        weight = (
            inputs.collectives.all_reduce(torch.as_tensor(weight, dtype=torch.float32, device=device)) / inputs.collectives.size
        )
    return (weight.clamp(min=1) if isinstance(weight, Tensor) else max(weight, 1)) * len(inputs.microbatches)


def _loss_factor(inputs: GradientInputs, weight: Number | None, total: WeightedMean | None) -> Number | None:
    """The factor of a micro-batch's loss before its backward pass; None for no factor."""
    assert weight is not None
    if not inputs.single:
        return weight
    if inputs.collectives is None:
        return None
    assert total is not None
    return weight * inputs.collectives.size / total.weight  # gradients are averaged, not summed, over the ranks


def _is_zero(weight: Number) -> bool:
    """Whether a weight is 0; False where that would need a synchronization."""
    return check_weight(float(weight)) == 0 if not isinstance(weight, Tensor) or weight.is_cpu else False


def _weighted_backward(loss: Tensor, weight: Number, leaves: Params, collectives: Collectives | None) -> None:
    hooks: list[Any] = []
    # the gradients of a mean over no examples are NaN, also times 0
    if isinstance(weight, Tensor) and not weight.is_cpu:  # reading it would synchronize with the device
        hooks = [
            leaf.register_hook(lambda grad: torch.where(weight == 0, 0.0, grad))  # type: ignore[no-untyped-call]
            for leaf in leaves.values()
        ]
    elif _is_zero(weight):
        metrics_parameter = None if collectives is None else collectives.metrics_parameter
        hooks = [
            node.register_prehook(_zero_gradients)
            for node in _accumulate_grad_nodes(loss)
            if node.variable is not metrics_parameter
        ]
    try:
        (loss * weight).backward()  # type: ignore[no-untyped-call]
    finally:  # the leaves are the user's own Parameters
        for hook in hooks:
            hook.remove()


def _zero_gradients(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in grads)


def _accumulate_grad_nodes(loss: Tensor) -> list[Any]:
    """The AccumulateGrad nodes of a loss, also those of parameters that `fully_shard` has all-gathered."""
    found, seen, pending = [], set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.append(node)
        pending += [parent for parent, _ in node.next_functions]
    return found


def _collect_gradients(leaves: Params, total: WeightedMean, collectives: Collectives | None) -> Params:
    grads = {}
    for name, leaf in leaves.items():
        # zeros for unused parameters, as torch.func has them
        grads[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        leaf.grad = None
    if collectives is not None and not collectives.reduces_in_backward:
        grads = collectives.average_gradients(grads)
    if total.divisor is not None and (isinstance(total.divisor, Tensor) or total.divisor != 1):
        torch._foreach_div_(local_tensors(grads.values()), total.divisor)
    return grads


def func_engine(forward: ForwardPass, inputs: GradientInputs) -> tuple[LossAux, Params]:
    """Gradients by `torch.func.grad_and_value`; pure, so it can be traced, vmapped and differentiated."""
    device, collectives = device_of(inputs.state.params), inputs.collectives
    outputs: list[LossOutput] = []
    grads: Params = {}
    buffers = inputs.state.buffers
    for index in range(len(inputs.microbatches)):
        inputs.seed(index, device)
        part, output, buffers = _grad_and_value(forward, inputs, buffers, index, device)
        outputs.append(output)
        if not inputs.single or collectives is not None:
            assert output.weight is not None
            weight = output.weight
            # in 16 bits, gradients times a number of tokens may overflow, and long sums lose small terms
            part = {name: multiply_by_weight(grad.float() if grad.dtype in HALF else grad, weight) for name, grad in part.items()}
        grads = {name: grads[name] + grad for name, grad in part.items()} if grads else part
    total = inputs.total(outputs)
    if collectives is not None:
        divisor = total.weight / collectives.size
        grads = {name: grad / divisor for name, grad in collectives.average_gradients(grads).items()}
        buffers = collectives.sync_buffers(buffers)
    elif total.divisor is not None:
        grads = {name: grad / total.divisor for name, grad in grads.items()}
    weight, params = total.weight, inputs.state.params
    grads = {name: grad if grad.dtype == params[name].dtype else grad.to(params[name].dtype) for name, grad in grads.items()}
    if not is_tracing():
        grads = _unshare(grads)
    elif not isinstance(weight, Tensor):  # vmap returns only tensors
        weight = torch.full((), float(weight), device=device)
    return LossAux(total.loss, weight, total.metrics, buffers), grads


def _grad_and_value(
    forward: ForwardPass, inputs: GradientInputs, buffers: Params, index: int, device: torch.device
) -> tuple[Params, LossOutput, Params]:
    binding, frozen = forward.binding, inputs.state.frozen
    numbers: dict[str, Any] = {}

    def loss_of_params(params: Params) -> tuple[Tensor, tuple[Params, Params]]:
        after = {name: tensor.clone() for name, tensor in buffers.items()}
        if binding is None:
            output = inputs.run(forward, params, index, device)
        else:
            with binding.reparametrize({**params, **frozen, **after}):
                output = inputs.run(forward, params, index, device)
                after = binding.get_buffers()
        # aux outputs of torch.func must be tensors
        aux = {"loss": output.loss}
        _put("weight", output.weight, aux, numbers)
        for name, value in output.metrics.items():
            mean, own = value if isinstance(value, tuple) else (value, None)
            _put(f"mean of {name}", mean, aux, numbers)
            if own is not None:
                _put(f"weight of {name}", own, aux, numbers)
        numbers["names"] = [(name, isinstance(value, tuple)) for name, value in output.metrics.items()]
        return scale_loss(output.loss, inputs.scale), (aux, after)

    grads, (_, (aux, after)) = torch.func.grad_and_value(loss_of_params, has_aux=True)(inputs.state.params)
    found = {**numbers, **aux}
    metrics = {
        name: (found[f"mean of {name}"], found[f"weight of {name}"]) if weighted else found[f"mean of {name}"]
        for name, weighted in numbers["names"]
    }
    return grads, LossOutput(aux["loss"], found["weight"], metrics), after


def _put(key: str, value: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    (tensors if isinstance(value, Tensor) else numbers)[key] = value


def _unshare(grads: Params) -> Params:
    # torch.func may return one tensor for two parameters, or an expanded one; the update may write in place
    seen: set[int] = set()
    unshared = {}
    for name, grad in grads.items():
        storage = grad.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() < grad.nbytes
        seen.add(storage.data_ptr())
        unshared[name] = grad.clone(memory_format=torch.contiguous_format) if shared else grad
    return unshared
