"""`fts replay`: one step of a run once more, with what is wrong in it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fts.errors import ArgumentError
from fts.loops.error_context import SHOWN
from fts.loops.replay import ReplayedStep, replay
from fts.messages import abbreviate

HEADINGS = {
    "batch": "the batch",
    "before": "parameters before the step",
    "gradients": "gradients",
    "after": "parameters after the step",
}


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "replay",
        help="run a step of a run once more, bit for bit, and look into it",
        description="Go from a checkpoint to a step, as the run went, and show the step: its items, loss, gradients, and what is "
        "NaN or infinite. If checkpoint-N is beside the checkpoint, the states are compared bit for bit; the exit status is 1 "
        "if they differ.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint-N directory from before the step")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the number of the step to look into")
    parser.add_argument(
        "--run",
        dest="call_model_init",
        required=True,
        metavar="CARD_FILE.py:FUNCTION",
        help="a function (or module:function) without arguments, which makes the run but does not start it: it returns a "
        "Trainer, or (step, state, data). The file is run as Python, so give only one that you trust",
    )
    parser.add_argument("--top", type=int, default=20, metavar="K", help="show the K largest gradients (default: 20)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Replay and report; 1 if the state is not that of the run."""
    if options.top < 0:
        raise ArgumentError(f"--top {options.top} is no number of gradients. Give 0 or more.")
    found = replayed(made_by(options.made_by), options.checkpoint, options.step, options.made_by)
    for line in report(found, options.checkpoint, options.top):
        print(line)
    return int(found.equal is False)


def replayed(made: Any, checkpoint: Path, step: int, name: str) -> ReplayedStep:
    """Replay what a function of the user's returned.

    Args:
        made: a Trainer, or `(step, state, data)`.
        checkpoint: from before the step.
        step: the number of the step.
        name: of the function, for errors.

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(made, tuple) and len(made) == 3:
        return replay(*made, checkpoint, step)
    if callable(getattr(made, "replay", None)):
        found: ReplayedStep = made.replay(checkpoint, step)
        return found
    raise ArgumentError(f"{name} returned {type(made).__name__}; it must return a Trainer, or (step, state, data).")


def made_by(text: str) -> Any:
    """What the function that `CARD_FILE.py:FUNCTION` or `module:function` names returns.

    Raises:
        ArgumentError: there is no such file, module or function.
    """
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise ArgumentError(f"--run {text!r} names no function: write CARD_FILE.py:FUNCTION or module:function.")
    module = _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ArgumentError(f"{place} has no function {name!r}. It has {there or 'none'}.")
    return function()


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, and something that it imports is not
            raise ArgumentError(f"There is no module {place!r} here. Give a file as CARD_FILE.py:FUNCTION.") from error
    path = Path(place)
    name = path.stem if path.stem not in sys.modules else f"run_of_{path.stem}"  # a module of that name may be in use
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ArgumentError(f"There is no file {path}.")
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where workers and dataclasses look for it
    spec.loader.exec_module(module)
    return module


def report(found: ReplayedStep, checkpoint: Path, top: int = 20) -> Iterator[str]:
    """What was found, in lines.

    Args:
        found: the step.
        checkpoint: from which it was replayed.
        top: how many gradients are shown.
    """
    yield f"Step {found.step}, from {checkpoint}: epoch {found.position.epoch}, batch {found.position.batch} (from 0)"
    if found.items is not None:
        yield f"items    {abbreviate(found.items, SHOWN)}"
    yield f"loss     {'not told' if found.loss is None else f'{found.loss:.9g}'}"
    figures = {name: float(value) for name, value in found.metrics.items() if name != "loss" and _is_number(value)}
    width = max(map(len, [*figures, "metric"]))
    yield from (f"  {name:<{width}}  {value:.9g}" for name, value in figures.items())
    if found.error is not None:
        yield f"The step raised {type(found.error).__name__}: {found.error}"
    yield from _gradients(found.gradients, top)
    yield from _faults(found)
    yield _comparison(found)


def _gradients(gradients: Mapping[str, Tensor] | None, top: int) -> Iterator[str]:
    if gradients is None:
        yield "The gradients cannot be shown: they could not be computed, or the step is not made of fts.steps.train_step."
        return
    if top == 0 or not gradients:
        return
    norms = {name: float(grad.float().norm()) for name, grad in gradients.items()}
    # NaN is greater than all
    ordered = sorted(norms.items(), key=lambda pair: (pair[1] == pair[1], -pair[1]))
    yield "norms of the gradients, before clipping:"
    yield from (f"  {norm:<12.6g} {name}" for name, norm in ordered[:top])
    if len(ordered) > top:
        yield f"  and {len(ordered) - top} more"


def _faults(found: ReplayedStep) -> Iterator[str]:
    if not found.nonfinite:
        yield "All numbers of the batch, the gradients and the parameters are finite."
    for part, names in found.nonfinite.items():
        yield f"Not finite in {HEADINGS[part]}:"
        yield from (f"  {name}: {counts}" for name, counts in names.items())
    if found.nonfinite_examples:
        yield f"The items with such numbers: {abbreviate(found.nonfinite_examples, SHOWN)}"


def _comparison(found: ReplayedStep) -> str:
    number = f"checkpoint-{found.step}"
    if found.compared_with is None:
        why = "the step raised" if found.after is None else f"there is no whole {number} beside the checkpoint"
        return f"The state after the step is compared with nothing: {why}."
    if found.equal:
        return f"The state after the step equals {number}, bit for bit."
    return f"The state after the step DIFFERS from {number} in {abbreviate(found.differences, 10)}."


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
