"""Optimizers: a scaling of the gradients with a learning rate and weight decay, and torch's fused kernel where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fts.transforms._checks import check_number, check_transform, format_label
from fts.transforms._fast_paths import Update, added, fast_update, for_kernel, fused_lists, scale_in_place
from fts.transforms._learning_rates import Rate, check_rate, checking, rate_at, rate_now, report, report_now
from fts.transforms._masks import Mask, as_predicate, everything, format_mask
from fts.transforms._scalars import new_count, times
from fts.transforms.scaling import decayed_weights
from fts.typing import Info, Number, OptState, Params, Transform


class FusedKernel(NamedTuple):
    """A kernel that makes an optimizer's complete update in place.

    Attributes:
        run: `run(params, grads, *moments, lr=, weight_decay=, step=)` on lists of tensors. `lr` is a number or 0-d tensor, `step`
            a 0-d int64 tensor, 1 in the first update.
        moments: the state's fields that it takes, in this order.
        half_on_cpu: whether it takes bfloat16 and float16 on the CPU.
        reads_step: whether it must know the number of the step, which can be read without waiting on the CPU alone.
    """

    run: Callable[..., None]
    moments: tuple[str, ...] = ()
    half_on_cpu: bool = True
    reads_step: bool = False


class OptimizerState(NamedTuple):
    """State of an optimizer whose scaling does not count updates.

    Attributes:
        step: 0-d int64 tensor: the number of updates so far.
        inner: the state of the scaling.
    """

    step: Tensor
    inner: OptState


def optimizer(
    name: str,
    scaling: Transform,
    lr: Rate,
    *,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    decoupled: bool = True,
    fused: FusedKernel | None = None,
    label: str | None = None,
) -> Transform:
    """Make an optimizer from the scaling of gradients that is its own: `-lr * (scaling(grads) + weight_decay * params)`.

    It checks learning rate, weight decay and mask, counts updates (in the scaling's own `step` where that has one), and reports
    `lr`.

    Args:
        name: of the optimizer, for messages.
        scaling: a transform such as `scale_by_adam()`.
        lr: learning rate: a number, a schedule, or a 0-d tensor.
        weight_decay: the fraction of a parameter that is taken off in an update, before it is multiplied by `lr`.
        mask: which parameters decay, as in `add_decayed_weights`; None means all.
        decoupled: decay behind the scaling, as in AdamW; False adds the decay to the gradients (L2 regularisation).
        fused: makes the complete update where its tensors allow it.
        label: the transform in words, for `describe`; `name` with learning rate and decay where None.

    Returns:
        A transform with the state of `scaling` or, where that has no `step`, with `OptimizerState`.

    Raises:
        ArgumentError: a number is out of range, or the mask is none.
        UnknownParameterError: (in `init`) the mask names something that is no parameter.
        ScheduleError: (in a step, or from `check`) the schedule returned a negative rate or one that is not finite.

    >>> import torch
    >>> from fts import transforms as tx
    >>> signs = tx.elementwise(lambda grad: grad.sign(), label="sign()")
    >>> descent, params = tx.optimizer("signsgd", signs, 0.1, weight_decay=0.5), {"w": torch.tensor([1.0])}
    >>> descent.update({"w": torch.tensor([20.0])}, descent.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    check_transform(name, scaling)
    check_rate(f"{name}: lr", lr)
    check_number(f"{name}: weight_decay", weight_decay)
    decays, check_names = as_predicate(everything if mask is None else mask, name)
    decay = decayed_weights(weight_decay, None if mask is None else decays, f"{name} with weight_decay")
    before, after = bool(weight_decay) and not decoupled, bool(weight_decay) and decoupled

    def init(params: Params) -> OptState:
        check_names(params)
        inner = scaling.init(params)
        counts = hasattr(inner, "step") and not isinstance(inner, OptimizerState)
        return inner if counts else OptimizerState(new_count(params), inner)

    def through(scale: Update, decay: Update, rate_of: Callable[[Rate, Tensor], Number]) -> Callable[..., Any]:
        """Everything but the learning rate's product, and the rate."""

        def scaled(grads: Params, state: Any, params: Params | None) -> tuple[Params, OptState, Info, Number]:
            rate = rate_of(lr, state.step)
            if before:
                grads, _, _ = decay(grads, (), params)
            updates, inner, info = scale(grads, state.inner if isinstance(state, OptimizerState) else state, params)
            if after:
                updates, _, _ = decay(updates, (), params)
            return updates, inner, info, rate

        return scaled

    pure, fast = through(scaling.update, decay.update, rate_at), through(fast_update(scaling), fast_update(decay), rate_now)

    def update(grads: Params, state: Any, params: Params | None) -> tuple[Params, OptState, Info]:
        updates, inner, info, rate = pure(grads, state, params)
        updates = {key: times(u, -rate) for key, u in updates.items()}
        after = OptimizerState(state.step + 1, inner) if isinstance(state, OptimizerState) else inner
        return updates, after, {**info, "lr": report(rate, state.step.device)}

    def update_(grads: Params, state: Any, params: Params | None) -> tuple[Params, OptState, Info]:
        updates, inner, info, rate = fast(grads, state, params)
        scale_in_place(updates.values(), -rate)
        after = OptimizerState(state.step.add_(1), inner) if isinstance(state, OptimizerState) else inner
        return updates, after, {**info, "lr": report_now(lr, rate, state.step.device)}

    slow_apply = added(update_)

    def apply(grads: Params, state: Any, params: Params) -> tuple[Params, OptState, Info]:
        if fused is None or (fused.reads_step and not state.step.is_cpu):
            return slow_apply(grads, state, params)
        moments = [getattr(state, field) for field in fused.moments]
        lists = fused_lists(params, grads, *moments, half_on_cpu=fused.half_on_cpu)
        if lists is None:
            return slow_apply(grads, state, params)
        rate = rate_now(lr, state.step)
        fraction = weight_decay
        if mask is not None and weight_decay:
            # decayed beforehand, one call of the kernel serves all; a second one would cost more than this product
            decayed = [param for key, param in params.items() if decays(key, param)]
            if decayed:
                scale_in_place(decayed, 1 - rate * weight_decay)
            fraction = 0.0
        fused.run(*lists, lr=for_kernel(rate), weight_decay=fraction, step=state.step.add_(1))
        return params, state, {"lr": report_now(lr, rate, state.step.device)}

    usable = fused is not None and (decoupled or mask is None)
    shown = None if mask is None else format_mask(mask)
    words = format_label(name, lr=lr, weight_decay=weight_decay or None, mask=shown) if label is None else label
    return Transform(init, update, apply if usable else None, update_, checking(lr), words)
