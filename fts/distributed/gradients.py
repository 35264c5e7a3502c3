"""How the gradients of several processes, each with its own micro-batches, become those of all (`fts.steps.Collectives`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, distributed, nn

from fts.distributed.error_propagation import check_alike
from fts.distributed.process_group import Group
from fts.errors import DistributedError
from fts.state import TrainState
from fts.typing import LossOutput, Params


@attrs.define(eq=False)
class _Processes:
    """What holds however gradients are exchanged.

    Args:
        group: the processes.
    """

    group: Group
    _checked: bool = attrs.field(default=False, init=False)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.group.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.group.size

    @property
    def carrier(self) -> Tensor | None:
        """Sums are exchanged by themselves."""
        return None

    def summing(self, sums: Tensor) -> Callable[[], Tensor]:
        """Begin the sum over the processes of a small tensor, which is overwritten; what is returned waits for it."""
        work = distributed.all_reduce(sums, group=self.group.handle, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return sums

        return wait

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Group.sum`."""
        return self.group.sum(tensor)

    def forward(self, run: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """The loss as it is."""
        return run

    def same(self, buffers: Params) -> Params:
        """Those of the first process."""
        if buffers and not torch.compiler.is_compiling():
            self.group.copy_first(list(buffers.values()))
        return buffers

    def check(self, state: TrainState) -> None:
        """Raise DistributedError where this process begins with another seed or other parameters than the first."""
        if not self._checked:
            self._checked = True
            check_alike(self.group, {"seed": state.seed})
            self.check_params(state.params)

    def check_params(self, params: Params) -> None:
        """Nothing: shards are parts of the same parameters by themselves."""


@attrs.define(eq=False)
class AllReduceGradients(_Processes):
    """Gradients of replicated parameters, averaged after the backward pass, all at once: for any engine, loss and graph.

    Args:
        group: the processes.
        same_buffers: whether what a forward pass writes to buffers is taken from the first process.
    """

    same_buffers: bool = True

    @property
    def reduces(self) -> bool:
        """Whether the backward pass has averaged already."""
        return False

    def mean(self, grads: Params) -> Params:
        """The mean over the processes, by one sum for each dtype."""
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, grad in grads.items():
            by_dtype.setdefault(grad.dtype, []).append(name)
        means: Params = {}
        for names in by_dtype.values():
            flat = torch.cat([grads[name].reshape(-1) for name in names])
            parts = torch.split(self.group.sum(flat) / self.size, [grads[name].numel() for name in names])
            means |= {name: part.view(grads[name].shape) for name, part in zip(names, parts, strict=True)}
        return {name: means[name] for name in grads}

    def same(self, buffers: Params) -> Params:
        """Those of the first process, unless each is to keep its own."""
        return super().same(buffers) if self.same_buffers else buffers

    def check_params(self, params: Params) -> None:
        """Each process holds all of them, so they must be equal."""
        check_same(self.group, params)

    def exchanging(self, now: bool) -> AbstractContextManager[Any]:
        """Nothing is exchanged in a backward pass."""
        return nullcontext()


def check_same(group: Group, params: Params) -> None:
    """Raise DistributedError where the processes have different parameters.

    Args:
        group: the processes.
        params: of this process, by name.
    """
    names = "\n".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in params.items())
    tensors = [tensor.detach() for tensor in params.values()]
    norms = [float(norm) for norm in torch._foreach_norm(tensors)]
    sums = [float(tensor.sum(dtype=torch.float64)) for tensor in tensors]
    found = group.gather((names, norms, sums))
    for rank, (other_names, other_norms, other_sums) in enumerate(found):
        if other_names != found[0][0]:
            raise DistributedError(
                f"Process {rank} trains other parameters than process 0. Build the same model, with the same parameters frozen, "
                "in every process."
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
                f"Process {rank} begins with another {differing!r} than process 0. Make the state equal first, by "
                "fts.distributed.synchronize(state, group), or seed every process alike before the model is made."
            )


CARRIED = 32
"""How many numbers go with the gradients: those of a loss and of 15 metrics. Which way they take must not depend on earlier
steps, or a resumed run would round otherwise."""


class _Loss(nn.Module):
    """A loss as the forward pass of a module, so that DDP sees whatever it does with its model as one pass.

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
        self.carrier = nn.Parameter(torch.zeros(CARRIED, dtype=wide, device=device))
        self.carried = torch.zeros_like(self.carrier)

    def forward(self, *args: Any) -> LossOutput:
        output = self.run(*args)
        return output._replace(loss=_carry(output.loss, self.carrier, self)) if output.loss.requires_grad else output


class _Carry(torch.autograd.Function):
    """A loss as it is, in whose backward pass `carrier` gets `carried` as its gradient, which DDP sends with the others."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, carrier: Tensor, owner: _Loss) -> Tensor:
        ctx.owner = owner
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.owner.carried, None


_carry: Callable[[Tensor, Tensor, _Loss], Tensor] = _Carry.apply


@attrs.define(eq=False)
class DDPGradients(AllReduceGradients):
    """Gradients of replicated parameters, which torch's DistributedDataParallel averages while the backward pass runs.

    Args:
        group: the processes.
        same_buffers: see `AllReduceGradients`.
        module: the model.
        options: of DistributedDataParallel.
        each_batch: whether gradients are averaged after each micro-batch.
    """

    module: nn.Module = attrs.field(kw_only=True)
    options: Mapping[str, Any] = attrs.field(kw_only=True, factory=dict)
    each_batch: bool = attrs.field(kw_only=True, default=False)
    loss: Any = attrs.field(default=None, init=False)
    _passed: bool = attrs.field(default=False, init=False)  # with this wrapper

    @property
    def reduces(self) -> bool:
        """The backward pass has averaged already."""
        return True

    @property
    def carrier(self) -> Tensor | None:
        """A parameter of DDP's that is none of the model's."""
        return None if self.loss is None else self.loss.module.carrier

    def summing(self, sums: Tensor) -> Callable[[], Tensor]:
        """They go with the gradients: a sum of their own would cost as much as a small layer."""
        loss: _Loss = self.loss.module
        count = sums.numel()
        if count > CARRIED:
            return super().summing(sums)
        carried = torch.zeros_like(loss.carrier)  # a new one: autograd may keep what it was given before
        carried[:count] = sums * self.size  # since DDP averages
        loss.carried = carried

        def wait() -> Tensor:
            assert loss.carrier.grad is not None
            return loss.carrier.grad[:count].to(sums.dtype, copy=True)

        return wait

    def forward(self, run: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """The loss as the forward pass of DDP."""
        if self.loss is None or self.loss.module.run is not run:
            # the values are equal already (see `check`), and buffers are made so after the pass
            self._passed = False
            self.loss = nn.parallel.DistributedDataParallel(
                _Loss(self.module, run),
                forward_sync_buffers=False,
                init_sync=False,
                process_group=self.group.handle,
                **self.options,
            )
        carrier = self.loss.module.carrier
        carrier.grad, self.loss.module.carried = None, torch.zeros_like(carrier)
        return self.loss  # type: ignore[no-any-return]

    @contextmanager
    def exchanging(self, now: bool) -> Iterator[None]:
        """DDP's `no_sync` where gradients are only gathered."""
        # a static graph is recorded in a first pass that exchanges
        exchanges = now or self.each_batch or (self.loss.static_graph and not self._passed)
        try:
            with nullcontext() if exchanges else self.loss.no_sync():
                yield
        except BaseException:
            self.loss = None  # DDP cannot go on where a backward pass broke off
            raise
        self._passed = True


@attrs.define(eq=False)
class FSDPGradients(_Processes):
    """Gradients of parameters that `fully_shard` has cut: hooks in the module gather the ones and scatter the others.

    Args:
        group: the processes.
        module: the model.
        each_batch: whether gradients are scattered after each micro-batch.
    """

    module: nn.Module
    each_batch: bool = False
    _parts: list[Any] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        # found once: a walk through all modules in each pass would cost as much as a small layer
        self._parts = [part for part in self.module.modules() if hasattr(part, "set_requires_gradient_sync")]

    @property
    def reduces(self) -> bool:
        """The backward pass has averaged already."""
        return True

    def mean(self, grads: Params) -> Params:
        """Nothing is left to do."""
        return grads

    @contextmanager
    def exchanging(self, now: bool) -> Iterator[None]:
        """Gradients are scattered in the last pass only, unless they are after each."""
        for part in self._parts:
            part.set_requires_gradient_sync(now or self.each_batch, recurse=False)
            part.set_is_last_backward(now)
        yield
