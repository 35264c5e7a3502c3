"""Going on from a checkpoint of transformers' Trainer, with an account of what could be carried over.

Its weights and its `trainer_state.json` are read as they are. The files of the optimizer and the schedule are pickles: they are
read by `torch.load(weights_only=True)`, which makes tensors, numbers and containers and runs nothing. The others
(`training_args.bin`, `rng_state.pth`, `scaler.pt`) are never opened.
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
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.checkpoints.transformers_files import TORCH_OPTIMIZER, TORCH_SCALER, TORCH_SCHEDULER
from fts.trainer.model import ADAPTERS, has_only_adapters, load_weights, named_tensors
from fts.trainer.optimization import RunOptimizer
from fts.trainer.reporting.running_metrics import RunningMetrics
from fts.transforms.importing import with_plateau, with_torch_moments
from fts.transforms.loss_scaling import LossScaleState

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class TransformersCheckpoint:
    """What a checkpoint of transformers' Trainer gives a run.

    Attributes:
        state: weights and, where it fits, the optimizer's state; `step` is the number of updates.
        start: where in the data to go on.
        told: the state that callbacks see.
        tally: the losses so far, as far as they were logged.
        carried: what was carried over, a line each.
        lost: what was not, and why, a line each.
    """

    state: TrainState
    start: Position
    told: TrainerState
    tally: RunningMetrics
    carried: list[str]
    lost: list[str]


def read_transformers_checkpoint(
    directory: Path, like: TrainState, model: nn.Module, optimizing: RunOptimizer, *, batches: int | None, accumulate: int
) -> TransformersCheckpoint:
    """Read a checkpoint that transformers' Trainer wrote.

    Args:
        directory: the checkpoint.
        like: a new state of the same model and transform.
        model: gets adapters, where the checkpoint has these alone.
        optimizing: the optimizer of the run, whose groups tell which parameter an entry of `optimizer.pt` is of. A torch schedule
            in it gets what `scheduler.pt` has.
        batches: micro-batches in an epoch; None where the data does not tell.
        accumulate: micro-batches in an update.

    Returns:
        What was read, and the account of it.

    Raises:
        CheckpointError: a file is missing or damaged, or of another model; or no update begins where the checkpoint is.
    """
    told = TrainerState.load_from_json(directory / TRAINER_STATE_NAME)
    if not (directory / TORCH_OPTIMIZER).is_file():
        raise CheckpointError(
            f"{directory} has no {TORCH_OPTIMIZER}: transformers' Trainer wrote it with save_only_model=True, or in files "
            "of DeepSpeed or FSDP, and a run cannot go on from it. Begin a new run with its model: from_pretrained(path)."
        )
    account = _Report()
    state = _load_weights(directory, like, model, account)
    state = _load_optimizer(directory, state, model, optimizing, told.global_step, account)
    state = _load_schedule(directory, state, optimizing, told.global_step, account)
    start = _resume_position(told, batches, accumulate, account)
    account.carried.append(
        f"step {told.global_step}, {len(told.log_history)} entries of the log history, the best metric ({told.best_metric}), the "
        f"states of callbacks ({', '.join(told.stateful_callbacks) or 'none'})"
    )
    account.lost.append("the states of random generators: fts draws from (seed, step), so dropout and augmentation draw anew")
    account.lost.append("training_args.bin, a pickled object, which is never loaded: the arguments of this run are used")
    processes = len(list(directory.glob("rng_state_*.pth")))
    if processes > 1:
        account.lost.append(f"the {processes} processes that the run had: this one is alone, and an update has its rows only")
    state = _loss_scale(directory, state, account)
    state = state.replace(step=torch.tensor(told.global_step, dtype=torch.int64))
    return TransformersCheckpoint(state, start, told, _running_metrics(told), account.carried, account.lost)


def transformers_step_offset(directory: Path, batches: int | None, accumulate: int) -> int:
    """How many more updates a checkpoint's run took than this run's sizes would have needed to come as far; see `EpochLayout.offset`."""
    told = TrainerState.load_from_json(directory / TRAINER_STATE_NAME)
    if batches is None:
        return 0
    start = _resume_position(told, batches, accumulate, _Report())
    return told.global_step - start.epoch * -(-batches // accumulate) - start.batch


def log_report(directory: Path, found: TransformersCheckpoint) -> None:
    """Log the account, a line for each thing."""
    logger.warning("%s was written by transformers' Trainer.", directory)
    for line in found.carried:
        logger.warning("  Carried over: %s.", line)
    for line in found.lost:
        logger.warning("  Not carried over: %s.", line)


@attrs.frozen
class _Report:
    carried: list[str] = attrs.Factory(list)
    lost: list[str] = attrs.Factory(list)


def _load_weights(directory: Path, like: TrainState, model: nn.Module, account: _Report) -> TrainState:
    if has_only_adapters(directory):
        load_weights(model, directory)
        own = named_tensors(model)
        account.carried.append(f"the adapters ({ADAPTERS}); all other weights are those of the model that the Trainer was given")
        return like.replace(
            params={name: own[name].detach() for name in like.params},
            buffers={name: own[name].detach() for name in like.buffers},
        )
    found = read_tensors(directory, WEIGHTS_NAME)
    aliases: dict[str, list[str]] = {}
    for alias, name in like.metadata.ties:
        aliases.setdefault(name, []).append(alias)

    def stored(name: str, form: Tensor) -> Tensor:
        key = next((key for key in (name, *aliases.get(name, [])) if key in found), None)
        if key is None or found[key].shape != form.shape:
            there = "is missing" if key is None else f"has the shape {list(found[key].shape)}"
            raise CheckpointError(
                f"{directory} does not fit the model {type(model).__name__}: {name} {there}; it must be {list(form.shape)}. Make "
                "the model that the run was of."
            )
        if found[key].dtype != form.dtype:
            cast.add(f"{found[key].dtype} to {form.dtype}")
        return found[key].to(device=form.device, dtype=form.dtype)

    cast: set[str] = set()
    saved = {name: stored(name, form) for name, form in (like.params | like.frozen).items()}
    buffers = {name: stored(name, form) if name in found else form for name, form in like.buffers.items()}
    unknown = found.keys() - saved.keys() - buffers.keys() - {alias for alias, _ in like.metadata.ties}
    if unknown:
        raise CheckpointError(
            f"{directory} does not fit the model {type(model).__name__}: it has {sorted(unknown)[:3]}, which the model has not. "
            "Make the model that the run was of."
        )
    changed = f", from {' and '.join(sorted(cast))}" if cast else ""
    account.carried.append(f"weights ({len(saved)} tensors{changed})")
    return like.replace(
        params={name: saved[name] for name in like.params},
        frozen={name: saved[name] for name in like.frozen},
        buffers=buffers,
    )


def _load_optimizer(
    directory: Path, state: TrainState, model: nn.Module, optimizing: RunOptimizer, step: int, account: _Report
) -> TrainState:
    entries, groups = _read_optimizer(directory / TORCH_OPTIMIZER)
    reason = "this run's optimizer is no torch optimizer" if optimizing.optimizer is None else ""
    names: list[str] = []
    if not reason:
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        own = [[named[id(parameter)] for parameter in group["params"]] for group in optimizing.optimizer.param_groups]
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
            _restore_groups(optimizing, groups)
            kept = sorted({str(key) for entry in moments.values() for key in entry})
            what = f"{', '.join(kept)} of {len(moments)} parameters" if kept else "it keeps nothing but its count"
            account.carried.append(f"the optimizer's state ({what})")
            return state.replace(opt_state=opt_state)
    account.lost.append(f"the optimizer's state, which begins anew: {reason}")
    return state


def _restore_groups(optimizing: RunOptimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Set what the run had made of a torch optimizer's groups, as its `load_state_dict` would."""
    if not optimizing.steps:
        return
    for group, saved in zip(optimizing.optimizer.param_groups, groups, strict=True):
        for name, value in saved.items():
            if name != "params" and name in group:
                if isinstance(group[name], Tensor):
                    group[name].copy_(torch.as_tensor(value))
                else:
                    group[name] = value


def _loss_scale(directory: Path, state: TrainState, account: _Report) -> TrainState:
    path = directory / TORCH_SCALER
    if not path.is_file():
        return state
    own = state.opt_state
    if not isinstance(own, LossScaleState):
        account.lost.append(f"the scale of fp16 losses ({TORCH_SCALER}): this run does not scale its losses")
        return state
    document = read_torch_file(path)
    scale, tracker = document.get("scale"), document.get("_growth_tracker")
    if not (isinstance(scale, float) and isinstance(tracker, int) and 0 < scale < math.inf):
        account.lost.append(f"the scale of fp16 losses, which begins anew: {TORCH_SCALER} has none")
    else:
        account.carried.append(f"the scale of fp16 losses, which is {scale:g}")
        kept = own._replace(scale=torch.full_like(own.scale, scale), growth_tracker=torch.full_like(own.growth_tracker, tracker))
        return state.replace(opt_state=kept)
    return state


def _load_schedule(directory: Path, state: TrainState, optimizing: RunOptimizer, step: int, account: _Report) -> TrainState:
    path = directory / TORCH_SCHEDULER
    if not path.is_file():
        account.lost.append(f"the learning rate schedule ({TORCH_SCHEDULER} is missing): that of the arguments is used")
        return state
    document = read_torch_file(path)
    if optimizing.steps:
        _restore_scheduler(path, optimizing.scheduler, document, account)
        return state
    rates = document.get("_last_lr")
    if not (isinstance(rates, list) and rates and isinstance(rates[0], float)) or (optimizing.schedule is None):
        try:
            opt_state = with_plateau(state.opt_state, rates[0], document)  # type: ignore[index]
        except (ArgumentError, LookupError, TypeError, ValueError, RuntimeError):
            account.lost.append("the memory of the learning rate schedule: it begins anew")
            return state
        account.carried.append(f"the rule of the learning rate, which is at {rates[0]:g}")  # type: ignore[index]
        return state.replace(opt_state=opt_state)
    now = float(optimizing.schedule(step))
    if math.isclose(now, rates[0], rel_tol=1e-6, abs_tol=1e-12):
        account.carried.append(f"the learning rate schedule, which is at {now:g}")
    else:
        account.lost.append(
            f"the learning rate, {rates[0]:g} at step {step}: by the arguments of this run it is {now:g}. args win"
        )
    return state


def _restore_scheduler(path: Path, scheduler: Any, document: dict[Any, Any], account: _Report) -> None:
    if scheduler is None:
        account.lost.append("the learning rate schedule: this run has none")
        return
    own = scheduler.state_dict()
    saved = {name: value for name, value in document.items() if name in own and name != "lr_lambdas"}
    try:
        scheduler.load_state_dict({**own, **saved})
    except Exception as error:  # whatever a scheduler of the user's makes of another's values
        raise CheckpointError(f"{path} does not fit {type(scheduler).__name__}: {error!r}. Make it as it was.") from error
    account.carried.append(f"the state of {type(scheduler).__name__}")


def _resume_position(told: TrainerState, batches: int | None, accumulate: int, account: _Report) -> Position:
    """The place of the next update: that of the step, or, where updates had other sizes, that of the epoch's share."""
    if batches is None:
        account.carried.append(f"the place in the data: {told.global_step} updates, which are read and skipped")
        return Position(0, told.global_step)
    per_epoch = -(-batches // accumulate)
    start = Position(*divmod(told.global_step, per_epoch))
    share = min(start.batch * accumulate, batches) / batches
    if not math.isclose(start.epoch + share, told.epoch, rel_tol=1e-6, abs_tol=1e-6):
        whole, rest = divmod(told.epoch, 1.0)
        updates = rest * batches / accumulate
        start = Position(int(whole), round(updates))
        if abs(updates - start.batch) > 1e-4:
            raise CheckpointError(
                f"The checkpoint is at epoch {told.epoch:g} after {told.global_step} updates. With these data and sizes an epoch "
                f"has {per_epoch} updates, none of which begins there: rows would be trained twice or never. Use the data, the "
                "per_device_train_batch_size and the gradient_accumulation_steps of that run, or a checkpoint at the end of an "
                "epoch."
            )
        account.lost.append(
            f"the size of updates: {told.global_step} of them came to epoch {told.epoch:g}, where this run would have taken "
            f"{start.epoch * per_epoch + start.batch}"
        )
    account.carried.append(
        f"the place in the data: epoch {start.epoch}, update {start.batch} of {per_epoch}; the order of the rows is the same if "
        "the seed is, and the sampler the usual one"
    )
    return start


def _running_metrics(told: TrainerState) -> RunningMetrics:
    """The sum of the losses that were logged, each of which is a mean over the updates since the one before."""
    total, last = 0.0, 0
    for entry in told.log_history:
        if isinstance(entry, dict) and isinstance(entry.get("loss"), (int, float)) and isinstance(entry.get("step"), int):
            total += float(entry["loss"]) * (entry["step"] - last)
            last = entry["step"]
    return RunningMetrics(total_loss=total, read_at=told.global_step, without_loss=told.global_step - last)


def read_torch_file(path: Path) -> dict[Any, Any]:
    """The dictionary in a file of `torch.save`, made of tensors, numbers and containers; nothing in it is run.

    Raises:
        CheckpointError: it cannot be read, or would have to run something.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many kinds
        raise CheckpointError(
            f"{path} cannot be read as tensors and numbers, and nothing else is loaded: {' '.join(str(error).split()):.200}"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds {type(document).__name__}; it must be a dictionary.")
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
    raise CheckpointError(f"{path} is not what a torch optimizer's state_dict() gives.")
