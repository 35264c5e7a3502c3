"""Resuming from a checkpoint of transformers' Trainer, with a report of what could be restored.

Its weights and its `trainer_state.json` are read as they are. The files of the optimizer, the schedule and the loss scale are
pickles: `torch.load(weights_only=True)` makes tensors, numbers and containers of them, and runs nothing. The others
(`training_args.bin`, `rng_state.pth`) are never opened.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fts.errors import ArgumentError, CheckpointError
from fts.loops import Position
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.state import WEIGHTS_NAME, TrainState
from fts.storage import read_tensors
from fts.trainer.callbacks import TrainerState
from fts.trainer.checkpoints.transformers_files import TORCH_OPTIMIZER, TORCH_SCALER, TORCH_SCHEDULER
from fts.trainer.model import ADAPTER_SAFE_WEIGHTS_NAME, has_only_adapters, load_weights, named_tensors
from fts.trainer.optimization import RunOptimizer
from fts.trainer.reporting import RunningMetrics
from fts.transforms.from_torch_state import with_plateau, with_torch_moments
from fts.transforms.loss_scaling import LossScaleState

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class TransformersCheckpoint:
    """What was read from a checkpoint of transformers' Trainer.

    Attributes:
        state: weights and, where it fits, the optimizer's state; `step` is the number of updates.
        start: where in the data to resume.
        trainer_state: the state that callbacks see.
        running_metrics: the losses so far, as far as they were logged.
        restored: what was restored, a line each.
        not_restored: what was not, and why, a line each.
    """

    state: TrainState
    start: Position
    trainer_state: TrainerState
    running_metrics: RunningMetrics
    restored: list[str]
    not_restored: list[str]


def read_transformers_checkpoint(
    directory: Path, like: TrainState, model: nn.Module, run_optimizer: RunOptimizer, *, batches: int | None, accumulate: int
) -> TransformersCheckpoint:
    """Read a checkpoint that transformers' Trainer wrote.

    Args:
        directory: the checkpoint.
        like: a new state of the same model and transform.
        model: gets adapters, where the checkpoint has these alone.
        run_optimizer: the optimizer of the run, by whose groups an entry of `optimizer.pt` is assigned to a parameter. A torch
            scheduler in it gets the state in `scheduler.pt`.
        batches: micro-batches in an epoch; None where the length of the data is unknown.
        accumulate: micro-batches in an update.

    Returns:
        What was read, with the report.

    Raises:
        CheckpointError: a file is missing, corrupt or of another model; or no update begins at the checkpoint's position.
    """
    trainer_state = TrainerState.load_from_json(directory / TRAINER_STATE_NAME)
    if not (directory / TORCH_OPTIMIZER).is_file():
        raise CheckpointError(
            f"{directory} has no {TORCH_OPTIMIZER}: transformers' Trainer wrote it with save_only_model=True, or in files "
            "of DeepSpeed or FSDP, and a run cannot resume from it. Begin a new run with its model: from_pretrained(path)."
        )
    report = _Report()
    state = _load_weights(directory, like, model, report)
    state = _load_optimizer(directory, state, model, run_optimizer, trainer_state.global_step, report)
    state = _load_schedule(directory, state, run_optimizer, trainer_state.global_step, report)
    start = _resume_position(trainer_state, batches, accumulate, report)
    report.restored.append(
        f"step {trainer_state.global_step}, {len(trainer_state.log_history)} entries of the log history, "
        f"the best metric ({trainer_state.best_metric}), "
        f"the states of callbacks ({', '.join(trainer_state.stateful_callbacks) or 'none'})"
    )
    report.not_restored.append(
        "the states of random generators: fts seeds them by (seed, step), so dropout and augmentation differ"
    )
    report.not_restored.append("training_args.bin, a pickled object, which is never loaded: the arguments of this run are used")
    processes = len(list(directory.glob("rng_state_*.pth")))
    if processes > 1:
        report.not_restored.append(f"the {processes} processes of the run: this run has one, and an update has its examples only")
    state = _load_loss_scale(directory, state, report)
    state = state.replace(step=torch.tensor(trainer_state.global_step, dtype=torch.int64))
    return TransformersCheckpoint(
        state, start, trainer_state, _running_metrics(trainer_state), report.restored, report.not_restored
    )


def transformers_step_offset(directory: Path, batches: int | None, accumulate: int) -> int:
    """`EpochLayout.offset` of a run that resumes: the updates taken beyond those that its own sizes need."""
    trainer_state = TrainerState.load_from_json(directory / TRAINER_STATE_NAME)
    if batches is None:
        return 0
    start = _resume_position(trainer_state, batches, accumulate, _Report())
    return trainer_state.global_step - start.epoch * -(-batches // accumulate) - start.batch


def log_report(directory: Path, found: TransformersCheckpoint) -> None:
    """Log the report, a line for each entry."""
    logger.warning("%s was written by transformers' Trainer.", directory)
    for line in found.restored:
        logger.warning("  Restored: %s.", line)
    for line in found.not_restored:
        logger.warning("  Not restored: %s.", line)


@attrs.frozen
class _Report:
    restored: list[str] = attrs.Factory(list)
    not_restored: list[str] = attrs.Factory(list)


def _load_weights(directory: Path, like: TrainState, model: nn.Module, report: _Report) -> TrainState:
    if has_only_adapters(directory):
        load_weights(model, directory)
        own = named_tensors(model)
        report.restored.append(f"the adapters ({ADAPTER_SAFE_WEIGHTS_NAME}); all other weights are those of the Trainer's model")
        return like.replace(
            params={name: own[name].detach() for name in like.params},
            buffers={name: own[name].detach() for name in like.buffers},
        )
    found = read_tensors(directory, WEIGHTS_NAME)
    aliases: dict[str, list[str]] = {}
    for alias, name in like.metadata.ties:
        aliases.setdefault(name, []).append(alias)

    def stored(name: str, target: Tensor) -> Tensor:
        key = next((key for key in (name, *aliases.get(name, [])) if key in found), None)
        if key is None or found[key].shape != target.shape:
            there = "is missing" if key is None else f"has the shape {list(found[key].shape)}"
            raise CheckpointError(
                f"{directory} does not fit the model {type(model).__name__}: {name} {there}; it must be {list(target.shape)}. "
                "Make the model of that run."
            )
        if found[key].dtype != target.dtype:
            cast.add(f"{found[key].dtype} to {target.dtype}")
        return found[key].to(device=target.device, dtype=target.dtype)

    cast: set[str] = set()
    saved = {name: stored(name, target) for name, target in (like.params | like.frozen).items()}
    buffers = {name: stored(name, target) if name in found else target for name, target in like.buffers.items()}
    unknown = found.keys() - saved.keys() - buffers.keys() - {alias for alias, _ in like.metadata.ties}
    if unknown:
        raise CheckpointError(
            f"{directory} does not fit the model {type(model).__name__}: it has {sorted(unknown)[:3]}, which the model has not. "
            "Make the model of that run."
        )
    changed = f", from {' and '.join(sorted(cast))}" if cast else ""
    report.restored.append(f"weights ({len(saved)} tensors{changed})")
    return like.replace(
        params={name: saved[name] for name in like.params},
        frozen={name: saved[name] for name in like.frozen},
        buffers=buffers,
    )


def _load_optimizer(
    directory: Path, state: TrainState, model: nn.Module, run_optimizer: RunOptimizer, step: int, report: _Report
) -> TrainState:
    entries, groups = _read_optimizer(directory / TORCH_OPTIMIZER)
    reason = "this run's optimizer is no torch optimizer" if run_optimizer.optimizer is None else ""
    names: list[str] = []
    if not reason:
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        own = [[named[id(parameter)] for parameter in group["params"]] for group in run_optimizer.optimizer.param_groups]
        sizes, found = [len(group) for group in own], [len(group["params"]) for group in groups]
        names = [name for group in own for name in group]
        if sizes != found:
            reason = f"its groups have {found} parameters, those of this run {sizes}"
    if not reason:
        indices = [index for group in groups for index in group["params"]]
        by_name = dict(zip(indices, names, strict=True))
        moments = {by_name[index]: entry for index, entry in entries.items() if index in by_name}
        try:
            opt_state = with_torch_moments(state.opt_state, moments, step=step, groups=groups)
        except (ArgumentError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error)
        else:
            _restore_groups(run_optimizer, groups)
            kept = sorted({str(key) for entry in moments.values() for key in entry})
            what = f"{', '.join(kept)} of {len(moments)} parameters" if kept else "a count alone"
            report.restored.append(f"the optimizer's state ({what})")
            return state.replace(opt_state=opt_state)
    report.not_restored.append(f"the optimizer's state, which begins anew: {reason}")
    return state


def _restore_groups(run_optimizer: RunOptimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Restore the settings of a torch optimizer's groups, as its `load_state_dict` would."""
    if not run_optimizer.steps_scheduler:
        return
    for group, saved in zip(run_optimizer.optimizer.param_groups, groups, strict=True):
        for name, value in saved.items():
            if name != "params" and name in group:
                if isinstance(group[name], Tensor):
                    group[name].copy_(torch.as_tensor(value))
                else:
                    group[name] = value


def _load_loss_scale(directory: Path, state: TrainState, report: _Report) -> TrainState:
    path = directory / TORCH_SCALER
    if not path.is_file():
        return state
    own = state.opt_state
    if not isinstance(own, LossScaleState):
        report.not_restored.append(f"the scale of fp16 losses ({TORCH_SCALER}): this run does not scale its losses")
        return state
    document = read_torch_file(path)
    scale, tracker = document.get("scale"), document.get("_growth_tracker")
    if not (isinstance(scale, float) and isinstance(tracker, int) and 0 < scale < math.inf):
        report.not_restored.append(f"the scale of fp16 losses, which begins anew: {TORCH_SCALER} has none")
    else:
        report.restored.append(f"the scale of fp16 losses, which is {scale:g}")
        kept = own._replace(scale=torch.full_like(own.scale, scale), growth_tracker=torch.full_like(own.growth_tracker, tracker))
        return state.replace(opt_state=kept)
    return state


def _load_schedule(directory: Path, state: TrainState, run_optimizer: RunOptimizer, step: int, report: _Report) -> TrainState:
    path = directory / TORCH_SCHEDULER
    if not path.is_file():
        report.not_restored.append(f"the learning rate schedule ({TORCH_SCHEDULER} is missing): that of the arguments is used")
        return state
    document = read_torch_file(path)
    if run_optimizer.steps_scheduler:
        _restore_scheduler(path, run_optimizer.scheduler, document, report)
        return state
    rates = document.get("_last_lr")
    if not (isinstance(rates, list) and rates and isinstance(rates[0], float)) or (run_optimizer.schedule is None):
        try:
            opt_state = with_plateau(state.opt_state, rates[0], document)  # type: ignore[index]
        except (ArgumentError, LookupError, TypeError, ValueError, RuntimeError):
            report.not_restored.append("the state of the learning rate schedule, which begins anew")
            return state
        report.restored.append(f"the rule of the learning rate, which is at {rates[0]:g}")  # type: ignore[index]
        return state.replace(opt_state=opt_state)
    now = float(run_optimizer.schedule(step))
    if math.isclose(now, rates[0], rel_tol=1e-6, abs_tol=1e-12):
        report.restored.append(f"the learning rate schedule, which is at {now:g}")
    else:
        report.not_restored.append(
            f"the learning rate, {rates[0]:g} at step {step}: by the arguments of this run it is {now:g}. args win"
        )
    return state


def _restore_scheduler(path: Path, scheduler: Any, document: dict[Any, Any], report: _Report) -> None:
    if scheduler is None:
        report.not_restored.append("the learning rate schedule: this run has none")
        return
    own = scheduler.state_dict()
    saved = {name: value for name, value in document.items() if name in own and name != "lr_lambdas"}
    try:
        scheduler.load_state_dict({**own, **saved})
    except Exception as error:  # a scheduler of the user's may raise anything
        raise CheckpointError(
            f"{path} does not fit {type(scheduler).__name__}: {error!r}. Make the scheduler as it was."
        ) from error
    report.restored.append(f"the state of {type(scheduler).__name__}")


def _resume_position(trainer_state: TrainerState, batches: int | None, accumulate: int, report: _Report) -> Position:
    """The position of the next update: by the step, or, where updates had other sizes, by the fraction of the epoch."""
    if batches is None:
        report.restored.append(f"the position in the data: {trainer_state.global_step} updates, which are read and skipped")
        return Position(0, trainer_state.global_step)
    per_epoch = -(-batches // accumulate)
    start = Position(*divmod(trainer_state.global_step, per_epoch))
    fraction = min(start.batch * accumulate, batches) / batches
    if not math.isclose(start.epoch + fraction, trainer_state.epoch, rel_tol=1e-6, abs_tol=1e-6):
        epochs, fraction = divmod(trainer_state.epoch, 1.0)
        updates = fraction * batches / accumulate
        start = Position(int(epochs), round(updates))
        if abs(updates - start.batch) > 1e-4:
            raise CheckpointError(
                f"The checkpoint is at epoch {trainer_state.epoch:g} after {trainer_state.global_step} updates. With these data "
                f"and sizes an epoch has {per_epoch} updates, none of which begins there: examples would be trained on twice or "
                "never. Use the data, the per_device_train_batch_size and the gradient_accumulation_steps of that run, or a "
                "checkpoint at the end of an epoch."
            )
        report.not_restored.append(
            f"the size of updates: epoch {trainer_state.epoch:g} took {trainer_state.global_step} of them, where this run would "
            f"have taken {start.epoch * per_epoch + start.batch}"
        )
    report.restored.append(
        f"the position in the data: epoch {start.epoch}, update {start.batch} of {per_epoch}; the order of the examples is the "
        "same with the same seed and the default sampler"
    )
    return start


def _running_metrics(trainer_state: TrainerState) -> RunningMetrics:
    """The sum of the losses that were logged, each of which is a mean over the updates since the one before."""
    total, last = 0.0, 0
    for entry in trainer_state.log_history:
        if isinstance(entry, dict) and isinstance(entry.get("loss"), (int, float)) and isinstance(entry.get("step"), int):
            total += float(entry["loss"]) * (entry["step"] - last)
            last = entry["step"]
    return RunningMetrics(total_loss=total, read_at=trainer_state.global_step, without_loss=trainer_state.global_step - last)


def read_torch_file(path: Path) -> dict[Any, Any]:
    """The dictionary in a file of `torch.save`, made of tensors, numbers and containers; nothing in it is executed.

    Raises:
        CheckpointError: it cannot be read, or has other objects.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt bytes raise many kinds of errors
        raise CheckpointError(
            f"{path} cannot be read as tensors and numbers, and nothing else is loaded: {' '.join(str(error).split()):.200}"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} has a {type(document).__name__}; it must be a dictionary.")
    return document


def _read_optimizer(path: Path) -> tuple[dict[Any, dict[Any, Any]], list[dict[str, Any]]]:
    document = read_torch_file(path)
    entries, groups = document.get("state"), document.get("param_groups")
    if (
        isinstance(entries, dict)
        and all(isinstance(entry, dict) for entry in entries.values())
        and isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and all(isinstance(index, int) for group in groups for index in group["params"])
    ):
        return entries, groups
    raise CheckpointError(f"{path} is not the state_dict() of a torch optimizer.")
