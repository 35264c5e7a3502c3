"""Laws of steps: purity, replay, donation, engines, accumulation, resumption."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import optree
import torch
from torch import Tensor, nn

from fts.errors import DonatedStateError
from fts.state import TrainState
from fts.steps import TrainStep, ValueAndGrad, batch_size_of, describe, with_donation
from fts.steps.losses import ModuleLoss
from fts.testing.comparison import clone_tree, fail, law, max_abs, named_tensors, require_close, require_equal
from fts.typing import Batch, StepFn

Step = StepFn[TrainState]


def step_summary(step: Any) -> str:
    """A step and its parts in one line, for messages."""
    return " / ".join(line.strip("│├└─ ") for line in describe(step).splitlines())


def metrics_are_flat(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """Metrics are a dictionary of 0-d tensors without gradients, with the same names in every step.

    Args:
        step: to check.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: they are not.
    """
    with law("metrics_are_flat", step_summary(step)):
        state = clone_tree(state)
        names: set[str] | None = None
        for batch in batches:
            state, metrics = _without_donation(step)(state, batch)
            for name, value in metrics.items():
                if not isinstance(value, Tensor) or value.ndim != 0:
                    found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                    fail(f"metrics[{name!r}] is {found}, not a 0-d tensor")
                if value.requires_grad:
                    fail(f"metrics[{name!r}] keeps the step's autograd graph; detach it")
            names = set(metrics) if names is None else names
            if set(metrics) != names:
                fail(f"the metrics' names became {sorted(metrics)} from {sorted(names)}")


def state_advances(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """The new state has the structure, shapes and dtypes of the old one, and a higher step.

    Args:
        step: to check.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: the structure of the state changed, or its step did not increase.
    """
    with law("state_advances", step_summary(step)):
        state = clone_tree(state)
        for batch in batches:
            after, _ = _without_donation(step)(state, batch)
            if int(after.step) <= int(state.step):
                fail(f"state.step is {int(after.step)} after a step from {int(state.step)}; a step increases it")
            found, expected = optree.tree_structure(after), optree.tree_structure(state)  # type: ignore[arg-type]
            if found != expected:
                fail(f"the state's structure became {found} from {expected}")
            for path, tensor in named_tensors("state", after).items():
                old = named_tensors("state", state)[path]
                if (tensor.shape, tensor.dtype, tensor.device) != (old.shape, old.dtype, old.device):
                    fail(f"{path} became {tensor.dtype}{list(tensor.shape)} from {old.dtype}{list(old.shape)}")
                if tensor.requires_grad:
                    fail(f"{path} keeps the step's autograd graph; detach it")
            state = after


def step_inputs_unchanged(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """A step without donation does not write the state or the batch, and later steps do not write its results.

    Args:
        step: to check.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: an input was changed.
    """
    with law("step_inputs_unchanged", step_summary(step)):
        state = clone_tree(state)
        kept: list[tuple[str, Any, Any]] = []
        for index, batch in enumerate(batches):
            kept.append((f"state {index}", state, clone_tree(state)))
            before = clone_tree(batch)
            state, metrics = _without_donation(step)(state, batch)
            kept.append((f"metrics {index}", metrics, clone_tree(metrics)))
            require_equal("after the step, batch", batch, before)
        for what, now, copied in kept:
            require_equal(what, now, copied)


def module_unchanged(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """The module of a loss is unchanged: its tensors, their values, gradients and training flags.

    Args:
        step: to check, if it is from `train_step` with a `module_loss`.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: the module was changed.
    """
    if not isinstance(step, TrainStep) or not isinstance(step.gradient_fn, ValueAndGrad):
        return
    if not isinstance(step.gradient_fn.forward.loss, ModuleLoss):
        return
    module = step.gradient_fn.forward.loss.module
    with law("module_unchanged", step_summary(step)):
        for variant in (step, with_donation(step)):
            before, tensors = _module_snapshot(module), clone_tree(module.state_dict())
            run_steps(variant, clone_tree(state), batches)
            if _module_snapshot(module) != before:
                fail("a parameter or buffer was replaced, or a gradient, requires_grad or training flag changed")
            require_equal("module", module.state_dict(), tensors)


def replayed_equals_first(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """The same state and batch give the same bits, even if random numbers were drawn from any generator in between.

    Args:
        step: to check.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: a replayed step had other results.
    """
    with law("replayed_equals_first", step_summary(step)):
        state = clone_tree(state)
        for batch in batches:
            first = _without_donation(step)(state, batch)
            _disturb_generators()
            again = _without_donation(step)(state, batch)
            require_equal("state", again[0], first[0])
            require_equal("metrics", again[1], first[1])
            state = first[0]


def donated_equals_pure(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """Steps with donation give the same bits, and consume their input state.

    Args:
        step: to check, if it can donate.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: the bits differ, or a consumed state can still be used.
    """
    if with_donation(step) is step and not getattr(step, "donate", False):
        return
    with law("donated_equals_pure", step_summary(step)):
        expected, metrics = run_steps(_without_donation(step), clone_tree(state), batches)
        found = clone_tree(state)
        donated_metrics: Any = {}
        for batch in batches:
            before = found
            found, donated_metrics = with_donation(step)(before, batch)
            try:
                _ = before.params
            except DonatedStateError:
                continue
            fail("the donated state can still be read; a step that reuses it must mark it as consumed")
        require_equal("the donated state", found, expected)
        require_equal("the donated metrics", donated_metrics, metrics)


def engines_agree(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """The engines `module` and `func` give the same states and metrics, to rounding.

    Args:
        step: to check, if it is from `train_step`.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: the engines differ.
    """
    if not isinstance(step, TrainStep) or not isinstance(step.gradient_fn, ValueAndGrad):
        return
    with law("engines_agree", step_summary(step)):
        for batch in batches:
            (expected, expected_metrics), (found, metrics) = (
                _without_donation(_with(step, engine=name))(clone_tree(state), batch) for name in ("module", "func")
            )
            _require_close_states("the state by engine 'func'", found, expected)
            require_close("the metrics by engine 'func'", metrics, expected_metrics, tolerance_factor=_metrics_tolerance(step))
            state = expected


def accumulated_equals_big_batch(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """Accumulation over two, three or batch-size micro-batches gives the state and metrics of the full batch, to rounding.

    Args:
        step: to check, if it is from `train_step`.
        state: the initial state.
        batches: of successive steps; those without a batch size are skipped.

    Raises:
        LawError: the results differ, as when a loss is not a mean over the examples that its weight counts.
    """
    if not isinstance(step, TrainStep) or not isinstance(step.gradient_fn, ValueAndGrad):
        return
    with law("accumulated_equals_big_batch", step_summary(step)):
        for batch in batches:
            expected, expected_metrics = _without_donation(_with(step, accumulate=1))(clone_tree(state), batch)
            for parts in sorted({2, 3, batch_size_of(batch) or 1}):
                if parts > (batch_size_of(batch) or 1):
                    continue
                for engine in ("module", "func"):
                    found, metrics = _without_donation(_with(step, accumulate=parts, engine=engine))(clone_tree(state), batch)
                    what = f"of {parts} micro-batches by engine {engine!r}"
                    _require_close_states(f"the state {what}", found, expected)
                    require_close(f"the metrics {what}", metrics, expected_metrics, tolerance_factor=_metrics_tolerance(step))
            state = expected


def resumed_equals_uninterrupted(step: Step, state: TrainState, batches: Sequence[Batch]) -> None:
    """A run that is saved and resumed between any two steps ends with the same bits.

    Args:
        step: to check.
        state: the initial state.
        batches: of successive steps.

    Raises:
        LawError: the resumed run has other results, or the state cannot be saved.
    """
    with law("resumed_equals_uninterrupted", step_summary(step)):
        expected, metrics = run_steps(_without_donation(step), clone_tree(state), batches)
        for resumed_at in range(len(batches)):
            middle, _ = run_steps(_without_donation(step), clone_tree(state), batches[:resumed_at])
            with tempfile.TemporaryDirectory() as directory:
                # values that the file lacks must come from a new state, not from the trained one
                middle = TrainState.load(middle.save(directory), like=clone_tree(state).replace(seed=state.seed + 1))
            _disturb_generators()
            found, found_metrics = run_steps(_without_donation(step), middle, batches[resumed_at:])
            require_equal(f"resumed at {resumed_at}, state", found, expected)
            require_equal(f"resumed at {resumed_at}, metrics", found_metrics, metrics)


def run_steps(step: Step, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Any]:
    """Run a step over batches; the metrics are those of the last one."""
    metrics: Any = {}
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def _without_donation(step: Step) -> Step:
    return with_donation(step, donate=False)  # type: ignore[no-any-return]


def _with(step: TrainStep, **changes: Any) -> TrainStep:
    gradients: Any = step.gradient_fn
    return attrs.evolve(step, gradient_fn=attrs.evolve(gradients, **changes))


def _require_close_states(what: str, found: TrainState, expected: TrainState) -> None:
    # an optimizer that divides by the gradient's size enlarges the rounding errors of small gradients
    require_close(f"{what}, params", found.params, expected.params, scale=max_abs(expected.params), tolerance_factor=100)
    require_close(f"{what}, buffers", found.buffers, expected.buffers, tolerance_factor=100)
    require_close(
        f"{what}, opt_state", found.opt_state, expected.opt_state, scale=max_abs(expected.opt_state), tolerance_factor=100
    )
    require_equal(f"{what}, step", found.step, expected.step)


def _metrics_tolerance(step: TrainStep) -> float:
    return 1e4 if getattr(step.gradient_fn, "precision", None) == "bf16" else 100.0


def _disturb_generators() -> None:
    torch.rand(3)
    np.random.random(3)
    random.random()


def _module_snapshot(module: nn.Module) -> list[Any]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, id(t), t.data_ptr(), t.requires_grad, id(t.grad) if t.grad is not None else None) for name, t in tensors] + [
        child.training for child in module.modules()
    ]
