"""Replay of one step of a run: its inputs, gradients and outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import optree
import torch
from torch import Tensor

from fts.errors import ArgumentError
from fts.loops.cadence import cadence
from fts.loops.checkpoint_status import is_complete
from fts.loops.checkpoints import load_checkpoint
from fts.loops.error_context import with_error_context
from fts.loops.events import StepBegin
from fts.loops.fit import fit, state_attribute
from fts.loops.position import Position
from fts.loops.rollback import clone_state
from fts.loops.source import Source
from fts.loops.source_factory import source
from fts.state import TrainState
from fts.steps.inspection import compute_gradients, has_gradients
from fts.steps.microbatches import MicroBatches, batch_size_of
from fts.steps.nonfinite import NonFiniteCounts, find_nonfinite
from fts.typing import Batch, Metrics, Params

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class ReplayedStep:
    """A step of a run that `replay` ran again.

    Attributes:
        step: its number, from 1.
        position: where in the data its batch is.
        examples: the indices of the batch's examples; None where they have none.
        batch: its input.
        before: the state before it.
        after: the state that it returned; None if it raised.
        metrics: that it returned; empty if it raised.
        error: of the step, or of the check of its metrics.
        loss: None where the step returns none.
        gradients: by the parameter's name, before any clipping; None where the step does not expose them, or raised an error.
        nonfinite: tensors with numbers that are NaN or infinite: of the "batch", the parameters "before", the "gradients" and
            the parameters "after", each by name; empty where all are finite.
        nonfinite_examples: the examples with numbers in the batch that are not finite.
        compared_with: the checkpoint that was written after this step, if there is one.
        differences: the names of the tensors of that checkpoint that are not bit for bit those of `after`.
    """

    step: int
    position: Position
    examples: list[Any] | None
    batch: Batch = attrs.field(repr=False)
    before: Any = attrs.field(repr=False)
    after: Any = attrs.field(repr=False)
    metrics: Metrics = attrs.field(repr=False)
    error: Exception | None
    loss: float | None
    gradients: Params | None = attrs.field(repr=False)
    nonfinite: Mapping[str, Mapping[str, NonFiniteCounts]]
    nonfinite_examples: list[Any]
    compared_with: Path | None
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool | None:
        """Whether the state equals the checkpoint of this step, bit for bit; None where there is none to compare with."""
        return None if self.compared_with is None else not self.differences


def replay(step: Any, state: Any, data: Any, checkpoint: str | Path, to_step: int) -> ReplayedStep:
    """Run the steps after a checkpoint again, and inspect the last of them.

    The order of the data and all randomness are functions of the seeds, so the steps are those of the run, bit for bit, if
    it ran on the same kind of device with the same step, data and versions, and only its steps changed the state (no rollback,
    no callback that writes weights).

    Args:
        step: that of the run: `(state, batch) -> (state, metrics)`. Steps made by `fts.steps.train_step` expose their gradients.
        state: one of the same model and transform, for instance a freshly created one; it is not changed.
        data: that of the run, as for `fit`.
        checkpoint: from before the step, best the nearest. If `checkpoint-<to_step>` is next to it, the states are compared.
        to_step: the number of the step to inspect.

    Returns:
        The inputs and outputs of the step, or the error that it raised.

    Raises:
        ArgumentError: the step is not after the checkpoint.
        CheckpointError: the checkpoint is corrupt, or of another model or transform.
        Exception: of an earlier step or the data; a note says where.

    >>> import tempfile
    >>> from fts import loops, steps, transforms as tx
    >>> step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), tx.sgd(0.1))
    >>> state = TrainState.create({"w": torch.ones(1)}, tx.sgd(0.1))
    >>> data = [torch.tensor([1.0]), torch.tensor([2.0])]
    >>> with tempfile.TemporaryDirectory() as root:
    ...     checkpoint = loops.save_checkpoint(f"{root}/checkpoint-0", state)
    ...     found = replay(step, state, data, checkpoint, to_step=2)
    >>> found.gradients, found.position, found.nonfinite
    ({'w': tensor([2.])}, Position(epoch=0, batch=1), {})
    """
    checkpoint = Path(checkpoint)
    loaded, start = load_checkpoint(checkpoint, like=state)
    at = int(state_attribute(loaded, "step"))
    if isinstance(to_step, bool) or not isinstance(to_step, int) or to_step <= at:
        raise ArgumentError(
            f"Step {to_step!r} cannot be replayed from {checkpoint}, which was written after step {at}. Give a later step, or an "
            "earlier checkpoint."
        )
    batches = data if isinstance(data, Source) else source(data, seed=state_attribute(loaded, "seed"))
    begin = _run_to(step, clone_state(loaded), batches, start, to_step)
    return _inspect(step, begin, batches, to_step, _checkpoint_of(checkpoint.parent, to_step))


def _run_to(step: Any, state: Any, batches: Source, start: Position, to_step: int) -> StepBegin:
    """Run to the beginning of a step."""
    events = with_error_context(fit(step, state, batches, total_steps=to_step, start=start, due=cadence(), donate=False), batches)
    begin = next(event for event in events if isinstance(event, StepBegin) and event.counters.step == to_step - 1)
    cast(Any, events).close()
    return begin


def _inspect(step: Any, begin: StepBegin, batches: Source, number: int, checkpoint: Path | None) -> ReplayedStep:
    batch, position = begin.batch, begin.counters.position
    before = clone_state(begin.state)  # a user's step may write into its state
    error: Exception | None = None
    after, metrics, value, gradients = None, dict[str, Any](), None, None
    try:
        if has_gradients(step):
            value, found = compute_gradients(step, begin.state, batch)
            gradients = {name: grad.detach().clone() for name, grad in found.items()}
        after, metrics = step(begin.state, batch)
        _check(step, metrics)
    except Exception as raised:  # noqa: BLE001  # it is part of the result
        error = raised
    examples = batches.example_indices(*attrs.astuple(position))
    loss = metrics.get("loss") if value is None else value.loss
    parts: dict[str, Params] = {
        "batch": dict(_floats_in(batch, "")),
        "before": _params_of(before),
        "gradients": gradients or {},
        "after": {} if after is None else _params_of(after),
    }
    nonfinite = {part: bad for part, tensors in parts.items() if (bad := find_nonfinite(tensors))}
    compared_with = None if after is None else checkpoint
    return ReplayedStep(
        number,
        position,
        examples,
        batch,
        before,
        after,
        metrics,
        error,
        None if loss is None else float(loss),
        gradients,
        nonfinite,
        _nonfinite_examples(batch, examples) if "batch" in nonfinite else [],
        compared_with,
        () if compared_with is None else _differences(after, position, begin, batches, compared_with),
    )


def _check(step: Any, metrics: Metrics) -> None:
    """The check that a step on a device other than the CPU leaves to the reader of its metrics."""
    check = getattr(step, "check", None)
    if check is not None:
        check({name: value.cpu() if isinstance(value, Tensor) else value for name, value in metrics.items()})


def _checkpoint_of(root: Path, step: int) -> Path | None:
    path = root / f"checkpoint-{step}"
    if not path.is_dir():
        return None
    if not is_complete(path):
        logger.warning("%s is not complete, so the replayed step is not compared with it.", path)
        return None
    return path


def _differences(after: Any, position: Position, begin: StepBegin, batches: Source, path: Path) -> tuple[str, ...]:
    expected, expected_position = load_checkpoint(path, like=after)
    ours, theirs = dict(_tensors_of(after)), dict(_tensors_of(expected))
    names = [name for name, tensor in ours.items() if not _same_bits(tensor, theirs[name])]
    per_epoch = batches.steps_per_epoch
    positions = [Position(position.epoch, position.batch + 1)]
    if per_epoch is None or positions[0].batch == per_epoch:
        positions.append(Position(position.epoch + 1, 0))  # the same position, as saved after the epoch's end
    return (*names, *([] if expected_position in positions else ["position in the data"]))


def _tensors_of(state: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, TrainState):
        for part in ("params", "frozen", "buffers"):
            yield from getattr(state, part).items()
        yield "step", state.step
        yield from _leaves(state.opt_state, "optimizer.")
        yield "seed", torch.tensor(state.seed)
    else:
        yield from _leaves(state, "")


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, Tensor):
            yield prefix + ".".join(map(str, path)), leaf


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that also holds for NaN."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


def _params_of(state: Any) -> Params:
    if isinstance(state, TrainState):
        return state.params
    return {name: tensor for name, tensor in _tensors_of(state) if tensor.is_floating_point()}


def _floats_in(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a batch, by their paths."""
    if isinstance(batch, Tensor):
        if batch.is_floating_point():
            yield name or "batch", batch
        return
    children = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (list, tuple)) else ()
    for key, child in children:
        yield from _floats_in(child, f"{name}.{key}" if name else str(key))


def _nonfinite_examples(batch: Any, examples: list[Any] | None) -> list[Any]:
    """The examples with numbers that are not finite, where the first dimension of each tensor is that of the examples."""
    bad: list[int] = []
    offset = 0
    for part in batch if isinstance(batch, MicroBatches) else [batch]:
        count = batch_size_of(part) or 0
        for _, tensor in _floats_in(part, ""):
            if tensor.ndim and tensor.shape[0] == count:
                finite = tensor.isfinite().reshape(count, -1).all(dim=1)
                bad += [offset + row for row in (~finite).nonzero().flatten().tolist()]
        offset += count
    return [examples[row] for row in sorted(set(bad))] if examples is not None and offset == len(examples) else []
