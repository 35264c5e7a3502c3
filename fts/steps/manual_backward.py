"""Manual backward: gradients of a function that calls `backward` itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fts.errors import ArgumentError, LossError
from fts.randomness import seed_microbatch
from fts.state import TrainState
from fts.steps.collectives import Collectives, global_microbatch_index
from fts.steps.engines import LossAux
from fts.steps.losses import check_callable, function_name
from fts.steps.microbatches import MicroBatches, PaddingBatch
from fts.steps.module_binding import ModuleBinding
from fts.steps.precision import LossScaler
from fts.steps.tracing import device_of, is_tracing
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import Batch, Params


@attrs.frozen(eq=False)
class ManualBackward:
    """A function `(state, batch, *args) -> (value, grads)`; made by `manual_backward`."""

    module: nn.Module
    fn: Callable[..., Any]
    binding: ModuleBinding
    collectives: Collectives | None = None
    scaler: LossScaler | None = None

    @property
    def label(self) -> str:
        return f"manual_backward({type(self.module).__name__}, {function_name(self.fn)})"

    def __call__(self, state: TrainState, batch: Batch, *args: Any, inplace_buffers: bool = False) -> tuple[LossAux, Params]:
        if is_tracing():
            raise ArgumentError(f"{self.label} calls backward itself, which a graph, vmap or torch.func does not support.")
        micro: Sequence[Batch] = batch if isinstance(batch, MicroBatches) else (batch,)
        binding, device = self.binding, device_of(state.params)
        binding.check(state)
        scale, collectives = find_loss_scale(state.opt_state), self.collectives
        if scale is not None and self.scaler is None:
            raise ArgumentError(
                f"{self.label} calls backward itself, and the state has a loss scale: make scaler = steps.LossScaler(), call "
                "scaler.scale(loss).backward() in the function, and pass manual_backward(..., scaler=scaler)."
            )
        if collectives is not None:
            collectives.check(state)
        buffers = {name: tensor.clone() for name, tensor in state.buffers.items()}
        with (
            nullcontext() if self.module.training else binding.training_mode(training=True),
            binding.swap_parameters(state.params, state.frozen, buffers),
            torch.enable_grad(),
        ):
            losses = []
            for index, part in enumerate(micro):
                if self.scaler is not None:
                    self.scaler.factor, self.scaler.used = scale, False
                seed_microbatch(state.seed, int(state.step), global_microbatch_index(index, collectives), device)
                with nullcontext() if collectives is None else collectives.gradient_sync(index == len(micro) - 1):
                    loss = self._loss(part.batch if isinstance(part, PaddingBatch) else part, args)
                losses.append(torch.zeros_like(loss) if isinstance(part, PaddingBatch) else loss)
            leaves = {name: binding.parameters[name] for name in state.params}
            grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
            buffers = binding.get_buffers()
        binding.check_structure()
        loss = torch.stack(losses).sum()
        if collectives is not None:
            grads = grads if collectives.reduces_in_backward else collectives.average_gradients(grads)
            loss, buffers = collectives.all_reduce(loss) / collectives.size, collectives.sync_buffers(buffers)
        return LossAux(loss, len(losses), {}, buffers), grads

    def _loss(self, batch: Batch, args: Sequence[Any]) -> Tensor:
        loss = self.fn(self.module, batch, *args)
        if self.scaler is not None and self.scaler.factor is not None and not self.scaler.used:
            raise ArgumentError(
                f"{self.label} did not scale its loss, but the state has a loss scale, by which its gradients will be divided. "
                "Call scaler.scale(loss).backward(), which accelerator.backward(loss) does, instead of loss.backward()."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError(f"{function_name(self.fn)} must return its loss as a tensor of one element, not {found}.")
        return loss.detach().reshape(())


def manual_backward(module: nn.Module, fn: Callable[..., Any], *, scaler: LossScaler | None = None) -> ManualBackward:
    """Make a gradient function of a function that runs forward and backward itself, for `gradient_step`.

    Args:
        module: while `fn` runs, its own Parameters have the state's tensors, and `.grad` starts as None.
        fn: `fn(model, batch, *args) -> loss` is called once for each micro-batch; it calls `backward` on each loss that adds to
            the gradients (so it scales for accumulation itself), and returns its share of the step's loss, a 0-d tensor.
        scaler: gets the loss scale of the state, if it has one (`tx.dynamic_loss_scale`); `fn` then calls
            `scaler.scale(loss).backward()`.

    Returns:
        `fn(state, batch, *args) -> (value, grads)`: the sum of the losses, and the sums of the gradients. It runs eagerly only.

    Raises:
        ArgumentError: `fn` is no function of two arguments; or (in a call) the state has a loss scale, and `fn` did not scale.
        LossError: `fn` did not return a loss.

    >>> import fts
    >>> from fts import steps, transforms as tx
    >>> net = nn.Linear(1, 1, bias=False)
    >>> def fn(model, x):
    ...     loss = model(x).sum()
    ...     loss.backward()
    ...     return loss
    >>> state = fts.TrainState.create(net, tx.sgd(0.1))
    >>> value, grads = manual_backward(net, fn)(state, torch.tensor([[3.0]]))
    >>> grads["weight"]
    tensor([[3.]])
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"manual_backward needs a torch.nn.Module, not {type(module).__name__}.")
    check_callable(fn, "manual_backward", "fn(model, batch)")
    return ManualBackward(module, fn, ModuleBinding(module), scaler=scaler)
