"""From a loss to gradients: two engines with one meaning, and accumulation over micro-batches.

    module   the state's tensors are lent to the module; `loss.backward()` fills `.grad` and the step drains it.
    func     `torch.func.grad_and_value`; for graphs, vmap, and derivatives through the step.

For micro-batches i with weight w_i the loss, the gradient and every metric are sum(w_i * x_i) / sum(w_i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import attrs
import torch
from torch import Tensor

from fts.errors import ArgumentError, LossError
from fts.randomness import STEP, fold, seed_generators
from fts.state import TrainState
from fts.steps.binding import Binding
from fts.steps.losses import ModuleLoss, call_loss, check_callable, name_of
from fts.steps.microbatches import MicroBatches, rows, split
from fts.steps.precision import autocast, autocast_dtype
from fts.typing import Batch, LossFn, LossOutput, Metrics, Number, Params

Engine: TypeAlias = Literal["module", "func"]


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
class ValueAndGrad:
    """A function `(state, batch) -> (value, grads)`; made by `value_and_grad`."""

    loss: LossFn | ModuleLoss
    engine: Engine
    accumulate: int
    precision: str | None
    dtype: torch.dtype | None
    binding: Binding | None

    def __call__(self, state: TrainState, batch: Batch, *args: Any, own_buffers: bool = False) -> tuple[Value, Params]:
        """Gradients at a state.

        Args:
            state: read, never written, unless `own_buffers` is set.
            batch: a batch, which is cut where `accumulate` > 1, or `MicroBatches`.
            args: passed on to the loss function whole, for instance a teacher's parameters.
            own_buffers: the forward pass may write the state's buffers in place.

        Returns:
            The value, and the gradients by parameter name. The next backward pass may reuse their storage.
        """
        micro, weigh_rows = self._cut(batch)
        if in_graph():
            return func_engine(self, state, micro, args, weigh_rows)
        if self.binding is not None:
            self.binding.check(state)
        # only torch.func can be differentiated or vmapped from outside
        func = self.engine == "func" or in_transform() or differentiated(state.params)
        with nullcontext() if self.binding is None else self.binding.mode(training=True):
            if not func:
                return module_engine(self, state, micro, args, weigh_rows, own_buffers)
            try:
                return func_engine(self, state, micro, args, weigh_rows)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error) or in_transform() or differentiated(state.params):
                    raise
                # torch.func cannot record activation checkpoints; the other engine means the same
                return module_engine(self, state, micro, args, weigh_rows, own_buffers)

    def _cut(self, batch: Batch) -> tuple[Sequence[Batch], bool]:
        if isinstance(batch, MicroBatches):
            if not batch:
                raise ArgumentError("MicroBatches is empty; a step needs at least one micro-batch.")
            return batch, False
        return (split(batch, self.accumulate) if self.accumulate > 1 else (batch,)), True

    def seed(self, state: TrainState, index: int, device: torch.device) -> None:
        """Seed the generators for micro-batch `index` of the state's step; a graph or a vmapped step is seeded outside."""
        if not in_transform():
            seed_generators(fold(state.seed, STEP, int(state.step), index), device)


def value_and_grad(
    loss: LossFn | ModuleLoss, *, engine: Engine = "module", accumulate: int = 1, precision: str | None = None
) -> ValueAndGrad:
    """A function that computes a loss and its gradients at a state.

    Args:
        loss: `loss(params, batch)`, or a `module_loss`.
        engine: "module" for speed, hooks and activation checkpointing, or "func" for `torch.func`. Inside a graph or a
            `torch.func` transformation, and where the parameters are differentiated from outside, it is always "func".
        accumulate: into how many micro-batches to cut each batch, to save memory; the result is that of the whole batch.
        precision: None or "bf16"; see `autocast_dtype`.

    Returns:
        `fn(state, batch) -> (value, grads)`. Randomness in micro-batch i of step k is a function of `(seed, k, i)`.

    Raises:
        ArgumentError: an argument has a value that cannot work.

    >>> import fts
    >>> from fts import transforms as tx
    >>> state = fts.TrainState.create({"w": torch.tensor([1.0, 2.0])}, tx.identity())
    >>> grad_fn = value_and_grad(lambda params, batch: (params["w"] * batch).sum())
    >>> value, grads = grad_fn(state, torch.tensor([3.0, 4.0]))
    >>> value.loss, grads["w"]
    (tensor(11.), tensor([3., 4.]))
    """
    if not isinstance(loss, ModuleLoss):
        if isinstance(loss, torch.nn.Module):
            raise ArgumentError(f"A module is not a loss. Wrap it: steps.module_loss({type(loss).__name__.lower()}, fn).")
        check_callable(loss, "value_and_grad", "loss(params, batch)")
    if engine not in get_args(Engine):
        raise ArgumentError(f"engine={engine!r} is unknown. Use 'module' or 'func'.")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ArgumentError(f"accumulate={accumulate!r} must be an integer of at least 1.")
    binding = Binding(loss.module) if isinstance(loss, ModuleLoss) else None
    return ValueAndGrad(loss, engine, accumulate, precision, autocast_dtype(precision), binding)


def module_engine(
    grad_fn: ValueAndGrad, state: TrainState, micro: Sequence[Batch], args: Sequence[Any], weigh_rows: bool, own_buffers: bool
) -> tuple[Value, Params]:
    """Gradients by `loss.backward()` into the `.grad` of the module's own Parameters, or of leaves for a plain function."""
    binding = grad_fn.binding
    device = device_of(state.params)
    if binding is None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.params.items()}
        total = _backward(grad_fn, state, leaves, micro, args, weigh_rows, device)
        return _value(total, state.buffers), _drain(leaves, total)
    buffers = state.buffers
    if buffers and not own_buffers:
        buffers = {name: tensor.clone() for name, tensor in buffers.items()}
    leaves = {name: binding.parameters[name] for name in state.params}
    with binding.lend(state.params, state.frozen, buffers):
        total = _backward(grad_fn, state, leaves, micro, args, weigh_rows, device)
        grads = _drain(leaves, total)
        if buffers:
            buffers = binding.get_buffers()
    return _value(total, buffers), grads


class Total(NamedTuple):
    """Weighted sums over micro-batches; `divisor` is None for a single one, whose weight cancels."""

    loss: Tensor
    weight: Number
    metrics: Metrics
    divisor: Number | None


def _backward(
    grad_fn: ValueAndGrad,
    state: TrainState,
    leaves: Params,
    micro: Sequence[Batch],
    args: Sequence[Any],
    weigh_rows: bool,
    device: torch.device,
) -> Total:
    outputs: list[tuple[LossOutput, Number]] = []
    single = len(micro) == 1
    for index, batch in enumerate(micro):
        grad_fn.seed(state, index, device)
        with torch.enable_grad():
            with autocast(device, grad_fn.dtype):
                output = call_loss(grad_fn.loss, leaves, batch, *args)
            weight = _weight(output, batch, weigh_rows)
            if not single and not isinstance(weight, Tensor) and weight == 0:
                continue  # a mean over no items is NaN, and NaN * 0 too
            if not output.loss.requires_grad:
                raise LossError(
                    f"The loss of {name_of(grad_fn.loss)} does not depend on any trained parameter: it has no gradient. "
                    "Look for .detach(), torch.no_grad() or .item() in the loss, or for parameters that are all frozen."
                )
            (output.loss if single else output.loss * weight).backward()  # type: ignore[no-untyped-call]
        outputs.append((output._replace(loss=output.loss.detach()), weight))
    return total_of(outputs, single=single)


def _drain(leaves: Params, total: Total) -> Params:
    grads = {}
    for name, leaf in leaves.items():
        # torch.func gives zeros where a parameter was not used
        grads[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        leaf.grad = None
    if total.divisor is not None:
        torch._foreach_div_(list(grads.values()), total.divisor)
    return grads


def func_engine(
    grad_fn: ValueAndGrad, state: TrainState, micro: Sequence[Batch], args: Sequence[Any], weigh_rows: bool
) -> tuple[Value, Params]:
    """Gradients by `torch.func.grad_and_value`; pure, so it can be traced, vmapped and differentiated."""
    device = device_of(state.params)
    outputs = []
    grads: Params = {}
    buffers = state.buffers
    for index, batch in enumerate(micro):
        grad_fn.seed(state, index, device)
        part, output, weight, buffers = _grad_and_value(grad_fn, state, buffers, batch, args, weigh_rows, device)
        outputs.append((output, weight))
        if len(micro) == 1:
            grads = part
        else:
            grads = {name: grad * weight if index == 0 else grads[name] + grad * weight for name, grad in part.items()}
    total = total_of(outputs, single=len(micro) == 1)
    if total.divisor is not None:
        grads = {name: grad / total.divisor for name, grad in grads.items()}
    if not in_transform():
        grads = _separate(grads)
    elif not isinstance(total.weight, Tensor):  # vmap returns tensors only
        total = total._replace(weight=torch.full((), float(total.weight), device=device))
    return _value(total, buffers), grads


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


def _grad_and_value(
    grad_fn: ValueAndGrad,
    state: TrainState,
    buffers: Params,
    batch: Batch,
    args: Sequence[Any],
    weigh_rows: bool,
    device: torch.device,
) -> tuple[Params, LossOutput, Number, Params]:
    loss, binding, frozen = grad_fn.loss, grad_fn.binding, state.frozen
    numbers: dict[str, Any] = {}

    def of_params(params: Params) -> tuple[Tensor, tuple[Params, Params]]:
        after = {name: tensor.clone() for name, tensor in buffers.items()}
        if binding is None:
            with autocast(device, grad_fn.dtype):
                output = call_loss(loss, params, batch, *args)
        else:
            with binding.exchange({**params, **frozen, **after}):
                with autocast(device, grad_fn.dtype):
                    output = call_loss(loss, params, batch, *args)
                after = binding.get_buffers()
        # torch.func passes tensors out, and nothing else
        aux = {"loss": output.loss}
        weight = _weight(output, batch, weigh_rows)
        _part("weight", weight, aux, numbers)
        for name, value in output.metrics.items():
            mean, own = value if isinstance(value, tuple) else (value, None)
            _part(f"mean of {name}", mean, aux, numbers)
            if own is not None:
                _part(f"weight of {name}", own, aux, numbers)
        numbers["names"] = [(name, isinstance(value, tuple)) for name, value in output.metrics.items()]
        return output.loss, (aux, after)

    grads, (_, (aux, after)) = torch.func.grad_and_value(of_params, has_aux=True)(state.params)
    found = {**numbers, **aux}
    metrics = {
        name: (found[f"mean of {name}"], found[f"weight of {name}"]) if weighted else found[f"mean of {name}"]
        for name, weighted in numbers["names"]
    }
    return grads, LossOutput(aux["loss"], found["weight"], metrics), found["weight"], after


def _part(key: str, value: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    (tensors if isinstance(value, Tensor) else numbers)[key] = value


def _weight(output: LossOutput, batch: Batch, weigh_rows: bool) -> Number:
    if output.weight is not None:
        return output.weight.detach() if isinstance(output.weight, Tensor) else output.weight
    return (rows(batch) or 1) if weigh_rows else 1


def total_of(outputs: Sequence[tuple[LossOutput, Number]], *, single: bool) -> Total:
    """Weighted means of losses and metrics over micro-batches; the weight of a single one cancels."""
    if not outputs:
        raise LossError("Every micro-batch has weight 0, so their mean loss is not defined. Does the batch have any labels?")
    if single:
        ((loss, _, metrics), weight) = outputs[0]
        return Total(loss, weight, {name: _mean(value, loss) for name, value in metrics.items()}, None)
    weight = sum(weight for _, weight in outputs)
    loss = sum(output.loss * weight for output, weight in outputs) / weight  # type: ignore[assignment]
    sums: dict[str, Any] = {}
    for output, own in outputs:
        for name, value in output.metrics.items():
            mean, item_weight = value if isinstance(value, tuple) else (value, own)
            total, items = sums.get(name, (0, 0))
            sums[name] = (total + _detached(mean) * item_weight, items + item_weight)
    return Total(loss, weight, {name: torch.as_tensor(total / items) for name, (total, items) in sums.items()}, weight)


def _mean(value: Any, like: Tensor) -> Tensor:
    mean = _detached(value[0] if isinstance(value, tuple) else value)
    return mean if isinstance(mean, Tensor) else torch.full((), float(mean), device=like.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _value(total: Total, buffers: Params) -> Value:
    return Value(total.loss, total.weight, total.metrics, buffers)


def device_of(params: Mapping[str, Tensor]) -> torch.device:
    """The device of the first parameter."""
    for tensor in params.values():
        return tensor.device
    raise ArgumentError("The state has no parameters to train.")


def differentiated(*trees: Mapping[str, Tensor]) -> bool:
    """Whether someone outside takes a derivative with respect to any of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tree in trees for tensor in tree.values())


def in_graph() -> bool:
    """Whether this code is being traced by torch.compile or torch.export."""
    return torch.compiler.is_compiling()


def in_transform() -> bool:
    """Whether this code runs inside a graph or a `torch.func` transformation, where nothing may be seeded or written."""
    return in_graph() or torch._C._functorch.peek_interpreter_stack() is not None
