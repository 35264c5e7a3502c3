"""Runs the same training under transformers' Trainer and under fts', and compares what can be observed.

Both sides start from copies of one model without dropout and get the same arguments, so they visit the same examples in the same
order and compute the same sums. What differs is rounding: fts may use another kernel for an optimizer (fused for foreach) and
may add in another order. A float32 sum is right to about 1e-7 of its size; Adam divides by the size of a gradient, which
makes such an error grow to about 1e-5 in a dozen steps. So losses must agree to 2e-5 of their size, gradient norms to 2e-4 (a
norm of small differences), learning rates to 1e-9 (they are computed in float64), and weights to 1e-4 of their size or 1e-5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import transformers
from torch import nn

import fts.trainer

TOLERANCES = {"loss": 2e-5, "grad_norm": 2e-4, "learning_rate": 1e-9, "epoch": 1e-12, "num_input_tokens_seen": 0}
SPEEDS = ("_runtime", "_per_second")


@attrs.frozen
class Side:
    """Where the classes of one side come from."""

    name: str
    module: Any

    def kind(self, name: str) -> Any:
        """A class of this side, such as Trainer."""
        return getattr(self.module, name)


THEIRS = Side("transformers", transformers)
OURS = Side("fts", fts.trainer)
SIDES = (THEIRS, OURS)

BASE = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 5,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-6,  # with 1e-8, gradients that are 0 but for rounding (of key biases) move weights
    "max_steps": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
}


def make(
    side: Side,
    folder: Any,
    model: nn.Module | None,
    parts: Callable[[nn.Module], dict[str, Any]],
    *,
    change: Callable[[Any, Side], Any] | None = None,
    family: str = "",
    **arguments: Any,
) -> Any:
    """A Trainer of one side on a copy of a model.

    Args:
        side: whose Trainer.
        folder: for its output.
        model: is copied; None where `parts` gives a model_init.
        parts: what else the Trainer takes, from the copy: data, metrics, optimizers.
        change: `(Trainer class, side) -> class`, to try a subclass.
        family: "Seq2Seq" for those classes.
        arguments: change those of BASE.
    """
    kind = side.kind(f"{family}Trainer")
    kind = kind if change is None else change(kind, side)
    own = copy.deepcopy(model)
    args = side.kind(f"{family}TrainingArguments")(output_dir=str(folder / side.name), **(BASE | arguments))
    return kind(own, args, **parts(own))


def made(folder: Any, model: nn.Module | None, parts: Callable[[nn.Module], dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """A Trainer of each side on copies of one model; transformers' first.

    Nothing may seed torch between this and the training: where data_seed is not given, transformers takes torch's initial seed,
    which its Trainer has set to that of the arguments, for the order of the data.
    """
    theirs, ours = [make(side, folder, model, parts, **options) for side in SIDES]
    return theirs, ours


def both(folder: Any, model: nn.Module | None, parts: Callable[[nn.Module], dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """Train under both; transformers' Trainer first."""
    trainers = made(folder, model, parts, **options)
    for trainer in trainers:
        trainer.train()
    return trainers


def entries(trainer: Any, name: str = "loss") -> list[dict[str, Any]]:
    """The entries of the log that have a metric."""
    return [entry for entry in trainer.state.log_history if name in entry]


def assert_same_training(theirs: Any, ours: Any, *, scale: float = 1.0, full: bool = True) -> None:
    """Every step's loss, gradient norm and learning rate, and the final weights, agree.

    Args:
        theirs: the Trainer of transformers.
        ours: that of fts.
        scale: widens the tolerances.
        full: whether the mean loss of the run agrees, too.
    """
    expected, found = entries(theirs), entries(ours)
    assert expected, "nothing was logged"
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for one, other in zip(expected, found, strict=True):
        assert other.keys() == one.keys()
        for name, tolerance in TOLERANCES.items():
            if name in one:
                wanted = pytest.approx(one[name], rel=tolerance * scale, abs=1e-7, nan_ok=True)
                assert other[name] == wanted, f"{name} at step {one['step']}"
    if full:
        one, other = (trainer.state.log_history[-1]["train_loss"] for trainer in (theirs, ours))
        assert other == pytest.approx(one, rel=TOLERANCES["loss"] * scale)
    assert_same_weights(theirs, ours, scale=scale)


def assert_same_weights(theirs: Any, ours: Any, *, scale: float = 1.0) -> None:
    """The models' weights agree."""
    expected, found = theirs.model.state_dict(), ours.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4 * scale, atol=1e-5 * scale, msg=lambda text, at=name: f"{at}: {text}"
        )


def assert_same_metrics(expected: dict[str, Any], found: dict[str, Any], *, rel: float = 2e-5) -> None:
    """Two dictionaries of metrics have the same names and, but for times, the same values.

    Args:
        expected: those of transformers.
        found: those of fts.
        rel: the relative tolerance.
    """
    # the time that wrapping the model took is there before a training alone, and in fts there is nothing to wrap
    expected, found = ({k: v for k, v in d.items() if not k.endswith("_model_preparation_time")} for d in (expected, found))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if not name.endswith(SPEEDS):
            assert value == pytest.approx(expected[name], rel=rel, abs=1e-7, nan_ok=True), name


def moved(trainer: Any, model: nn.Module) -> bool:
    """Whether a training changed any weight."""
    start = model.state_dict()
    return any(not torch.equal(tensor, start[name]) for name, tensor in trainer.model.state_dict().items())
