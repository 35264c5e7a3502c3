"""`fts replay`: run one step of a run again, and show what is wrong in it."""

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
from fts.loops.error_context import MAX_LISTED
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
        help="run a step of a run again, bit for bit, and inspect it",
        description="Run from a checkpoint to a step, as the run did, and show the step: its examples, loss, gradients, and what "
        "is NaN or infinite. If checkpoint-N is next to the checkpoint, the states are compared bit for bit; the exit status is "
        "1 if they differ.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint-N directory from before the step")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the number of the step to inspect")
    parser.add_argument(
        "--run",
        dest="function",
        required=True,
        metavar="FILE.py:FUNCTION",
        help="a function (or module:function) without arguments, which makes the run but does not start it: it returns a "
        "Trainer, or (step, state, data). The file is run as Python, so give only one that you trust",
    )
    parser.add_argument("--top", type=int, default=20, metavar="K", help="show the K largest gradients (default: 20)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Replay and report; 1 if the state is not that of the run."""
    if options.top < 0:
        raise ArgumentError(f"--top {options.top} is not a number of gradients. Give 0 or more.")
    found = replay_run(call_function(options.function), options.checkpoint, options.step, options.function)
    for line in report(found, options.checkpoint, options.top):
        print(line)
    return int(found.equal is False)


def replay_run(run: Any, checkpoint: Path, step: int, name: str) -> ReplayedStep:
    """Replay the run that a function of the user returned.

    Args:
        run: a Trainer, or `(step, state, data)`.
        checkpoint: from before the step.
        step: the number of the step.
        name: of the function, for errors.

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(run, tuple) and len(run) == 3:
        return replay(*run, checkpoint, step)
    if callable(getattr(run, "replay", None)):
        found: ReplayedStep = run.replay(checkpoint, step)
        return found
    raise ArgumentError(f"{name} returned {type(run).__name__}; it must return a Trainer, or (step, state, data).")


def call_function(text: str) -> Any:
    """Call the function at `FILE.py:FUNCTION` or `module:function`.

    Raises:
        ArgumentError: there is no such file, module or function.
    """
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier():
        raise ArgumentError(f"--run {text!r} is not a function: write FILE.py:FUNCTION or module:function.")
    module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        functions = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ArgumentError(f"{path} has no function {name!r}. It has {functions or 'none'}.")
    return function()


def _import(source: str) -> ModuleType:
    if not source.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{source}.".startswith(f"{error.name}."):
                raise  # the module exists, but one that it imports does not
            raise ArgumentError(f"There is no module {source!r}. Give a file as FILE.py:FUNCTION.") from error
    path = Path(source)
    name = path.stem if path.stem not in sys.modules else f"run_of_{path.stem}"  # that name may be imported already
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ArgumentError(f"There is no file {path}.")
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where workers and dataclasses look for it
    spec.loader.exec_module(module)
    return module


def report(found: ReplayedStep, checkpoint: Path, top: int = 20) -> Iterator[str]:
    """The replayed step, in lines.

    Args:
        found: the replayed step.
        checkpoint: from which it was replayed.
        top: how many gradients to show.
    """
    yield f"Step {found.step}, from {checkpoint}: epoch {found.position.epoch}, batch {found.position.batch} (from 0)"
    if found.examples is not None:
        yield f"examples {abbreviate(found.examples, MAX_LISTED)}"
    yield f"loss     {'unknown' if found.loss is None else f'{found.loss:.9g}'}"
    metrics = {name: float(value) for name, value in found.metrics.items() if name != "loss" and _is_number(value)}
    width = max(map(len, [*metrics, "metric"]))
    yield from (f"  {name:<{width}}  {value:.9g}" for name, value in metrics.items())
    if found.error is not None:
        yield f"The step raised {type(found.error).__name__}: {found.error}"
    yield from _gradients(found.gradients, top)
    yield from _nonfinite(found)
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


def _nonfinite(found: ReplayedStep) -> Iterator[str]:
    if not found.nonfinite:
        yield "All numbers of the batch, the gradients and the parameters are finite."
    for part, names in found.nonfinite.items():
        yield f"Not finite in {HEADINGS[part]}:"
        yield from (f"  {name}: {counts}" for name, counts in names.items())
    if found.nonfinite_examples:
        yield f"The examples with such numbers: {abbreviate(found.nonfinite_examples, MAX_LISTED)}"


def _comparison(found: ReplayedStep) -> str:
    number = f"checkpoint-{found.step}"
    if found.compared_with is None:
        why = "the step raised" if found.after is None else f"there is no complete {number} next to the checkpoint"
        return f"The state after the step is not compared with a checkpoint: {why}."
    if found.equal:
        return f"The state after the step equals {number}, bit for bit."
    return f"The state after the step DIFFERS from {number} in {abbreviate(found.differences, 10)}."


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
