"""Gradient synchronization over ranks, by all-reduce, DDP or FSDP2: the implementations of `fts.steps.Collectives`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, distributed, nn

from fts.distributed.error_propagation import check_same_on_all_ranks
from fts.distributed.process_group import Group
from fts.errors import DistributedError
from fts.state import TrainState
from fts.typing import LossOutput, Params


@attrs.define(eq=False)
class _GradientCollectives:
    """What all ways of gradient synchronization share.

    Args:
        group: the processes.
    """

    group: Group
    _checked: bool = attrs.field(default=False, init=False)

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.group.rank

    @property
    def size(self) -> int:
        """The world size."""
        return self.group.size

    @property
    def metrics_parameter(self) -> Tensor | None:
        """None: metrics have an all-reduce of their own."""
        return None

    def all_reduce_async(self, sums: Tensor) -> Callable[[], Tensor]:
        """Start the all-reduce of a small tensor, which is overwritten; the returned function waits for it."""
        work = distributed.all_reduce(sums, group=self.group.process_group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return sums

        return wait

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Group.all_reduce`."""
        return self.group.all_reduce(tensor)

    def wrap_forward(self, run: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """The loss, unchanged."""
        return run

    def sync_buffers(self, buffers: Params) -> Params:
        """Broadcast buffers from the main process."""
        if buffers and not torch.compiler.is_compiling():
            self.group.broadcast_(list(buffers.values()))
        return buffers

    def check(self, state: TrainState) -> None:
        """Raise DistributedError where the ranks start with different seeds or parameters."""
        if not self._checked:
            self._checked = True
            check_same_on_all_ranks(self.group, {"seed": state.seed})
            self.check_params(state.params)

    def check_params(self, params: Params) -> None:
        """Nothing: shards are parts of one full tensor already."""


@attrs.define(eq=False)
class AllReduceGradients(_GradientCollectives):
    """Gradients of replicated parameters, averaged after the backward pass by an all-reduce: for any engine, loss and graph.

    Args:
        group: the processes.
        broadcast_buffers: whether buffers are broadcast from the main process after a forward pass.
    """

    broadcast_buffers: bool = True

    @property
    def reduces_in_backward(self) -> bool:
        """False: `average_gradients` follows the backward pass."""
        return False

    def average_gradients(self, grads: Params) -> Params:
        """The mean over ranks, by one all-reduce for each dtype."""
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, grad in grads.items():
            by_dtype.setdefault(grad.dtype, []).append(name)
        means: Params = {}
        for names in by_dtype.values():
            flat = torch.cat([grads[name].reshape(-1) for name in names])
            parts = torch.split(self.group.all_reduce(flat) / self.size, [grads[name].numel() for name in names])
            means |= {name: part.view(grads[name].shape) for name, part in zip(names, parts, strict=True)}
        return {name: means[name] for name in grads}

    def sync_buffers(self, buffers: Params) -> Params:
        """Broadcast buffers from the main process, unless each rank keeps its own."""
        return super().sync_buffers(buffers) if self.broadcast_buffers else buffers

    def check_params(self, params: Params) -> None:
        """Parameters are replicated, so they must be equal on all ranks."""
        check_same_params(self.group, params)

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[Any]:
        """Nothing is reduced in a backward pass."""
        return nullcontext()


def check_same_params(group: Group, params: Params) -> None:
    """Raise DistributedError where the ranks have different parameters.

    Args:
        group: the processes.
        params: of this rank, by name.
    """
    names = "\n".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in params.items())
    tensors = [tensor.detach() for tensor in params.values()]
    norms = [float(norm) for norm in torch._foreach_norm(tensors)]
    sums = [float(tensor.sum(dtype=torch.float64)) for tensor in tensors]
    found = group.all_gather_object((names, norms, sums))
    for rank, (other_names, other_norms, other_sums) in enumerate(found):
        if other_names != found[0][0]:
            raise DistributedError(
                f"Process {rank} trains other parameters than process 0. Build the same model, with the same parameters frozen, "
                "on all ranks."
            )
        _, first_norms, first_sums = found[0]
        differing = next(
            (
                name
                for name, norm, first, total, other in zip(params, other_norms, first_norms, other_sums, first_sums, strict=True)
                if abs(norm - first) > 1e-5 * first or abs(total - other) > 1e-5 * (1 + first)
            ),
            None,
        )
        if differing is not None:
            raise DistributedError(
                f"Process {rank} starts with another {differing!r} than process 0. Make the state equal first, by "
                "fts.distributed.broadcast_state(state, group), or set the same seed on all ranks before the model is created."
            )


MAX_METRIC_SUMS = 32
"""How many numbers DDP reduces with the gradients: those of a loss and of 15 metrics. It must not depend on earlier steps, or a
resumed run would round differently."""


class _LossModule(nn.Module):
    """A loss as the forward pass of a module, so that DDP sees all calls of the model as one pass.

    Args:
        module: the model.
        run: the loss, as engines call it.
    """

    def __init__(self, module: nn.Module, run: Callable[..., LossOutput]) -> None:
        super().__init__()
        self.module = module
        self.run = run
        dtypes = {parameter.dtype for parameter in module.parameters()}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        device = next(module.parameters()).device
        self.metrics_parameter = nn.Parameter(torch.zeros(MAX_METRIC_SUMS, dtype=wide, device=device))
        self.metric_sums = torch.zeros_like(self.metrics_parameter)

    def forward(self, *args: Any) -> LossOutput:
        output = self.run(*args)
        return (
            output._replace(loss=_send_metrics(output.loss, self.metrics_parameter, self))
            if output.loss.requires_grad
            else output
        )


class _SendMetrics(torch.autograd.Function):
    """The identity; in its backward pass `metrics_parameter` gets `metric_sums` as its gradient, which DDP reduces too."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, metrics_parameter: Tensor, owner: _LossModule) -> Tensor:
        ctx.owner = owner
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.owner.metric_sums, None


_send_metrics: Callable[[Tensor, Tensor, _LossModule], Tensor] = _SendMetrics.apply


@attrs.define(eq=False)
class DDPGradients(AllReduceGradients):
    """Gradients of replicated parameters, which torch's DistributedDataParallel averages during the backward pass.

    Args:
        group: the processes.
        broadcast_buffers: see `AllReduceGradients`.
        module: the model.
        options: of DistributedDataParallel.
        sync_each_batch: whether gradients are averaged after each micro-batch.
    """

    module: nn.Module = attrs.field(kw_only=True)
    options: Mapping[str, Any] = attrs.field(kw_only=True, factory=dict)
    sync_each_batch: bool = attrs.field(kw_only=True, default=False)
    loss: Any = attrs.field(default=None, init=False)
    _passed: bool = attrs.field(default=False, init=False)  # with this wrapper

    @property
    def reduces_in_backward(self) -> bool:
        """True: the backward pass averages gradients."""
        return True

    @property
    def metrics_parameter(self) -> Tensor | None:
        """A parameter of the DDP module that the model does not have."""
        return None if self.loss is None else self.loss.module.metrics_parameter

    def all_reduce_async(self, sums: Tensor) -> Callable[[], Tensor]:
        """Metrics are reduced with the gradients: an all-reduce of their own would cost as much as a small layer."""
        loss: _LossModule = self.loss.module
        count = sums.numel()
        if count > MAX_METRIC_SUMS:
            return super().all_reduce_async(sums)
        metric_sums = torch.zeros_like(loss.metrics_parameter)  # a new tensor: autograd may keep the previous one
        metric_sums[:count] = sums * self.size  # since DDP averages
        loss.metric_sums = metric_sums

        def wait() -> Tensor:
            assert loss.metrics_parameter.grad is not None
            return loss.metrics_parameter.grad[:count].to(sums.dtype, copy=True)

        return wait

    def wrap_forward(self, run: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """The loss, as the forward pass of a DDP module."""
        if self.loss is None or self.loss.module.run is not run:
            # parameters are equal already (see `check`), and buffers are broadcast after the pass
            self._passed = False
            self.loss = nn.parallel.DistributedDataParallel(
                _LossModule(self.module, run),
                forward_sync_buffers=False,
                init_sync=False,
                process_group=self.group.process_group,
                **self.options,
            )
        parameter = self.loss.module.metrics_parameter
        parameter.grad, self.loss.module.metric_sums = None, torch.zeros_like(parameter)
        return self.loss  # type: ignore[no-any-return]

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """DDP's `no_sync` where gradients are only accumulated."""
        # a static graph is recorded in a first pass with synchronization
        syncs = enabled or self.sync_each_batch or (self.loss.static_graph and not self._passed)
        try:
            with nullcontext() if syncs else self.loss.no_sync():
                yield
        except BaseException:
            self.loss = None  # DDP cannot continue after an interrupted backward pass
            raise
        self._passed = True


@attrs.define(eq=False)
class FSDPGradients(_GradientCollectives):
    """Gradients of sharded parameters: the hooks of `fully_shard` all-gather parameters and reduce-scatter gradients.

    Args:
        group: the processes.
        module: the model.
        sync_each_batch: whether gradients are reduced after each micro-batch.
    """

    module: nn.Module
    sync_each_batch: bool = False
    _units: list[Any] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        # collected once: a walk through all modules in each pass would cost as much as a small layer
        self._units = [part for part in self.module.modules() if hasattr(part, "set_requires_gradient_sync")]

    @property
    def reduces_in_backward(self) -> bool:
        """True: the backward pass averages gradients."""
        return True

    def average_gradients(self, grads: Params) -> Params:
        """The gradients, unchanged."""
        return grads

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Gradients are reduced in the last pass only, unless `sync_each_batch`."""
        for unit in self._units:
            unit.set_requires_gradient_sync(enabled or self.sync_each_batch, recurse=False)
            unit.set_is_last_backward(enabled)
        yield
