"""What a Trainer uploads, and when."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fts import loops
from fts.errors import CallbackError, HubError
from fts.loops.checkpoint_list import checkpoints_in
from fts.trainer.arguments.choices import HubStrategy, SaveStrategy
from fts.trainer.hub import snapshots
from fts.trainer.hub.repository import Repository
from fts.trainer.hub.uploads import Upload

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from fts.trainer.arguments import TrainingArguments
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

_SAVING: ContextVar[bool] = ContextVar("saving", default=False)

LAST = "last-checkpoint"
"""Where strategy "checkpoint" keeps the newest one in the repository."""


def repository_of(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> Repository:
    """The repository that the arguments name: `hub_model_id`, or the name of `output_dir`.

    Args:
        args: the arguments.
        token: instead of `hub_token`.
        private: instead of `hub_private_repo`.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    private = args.hub_private_repo if private is None else private
    return Repository(name, token or args.hub_token, private, args.hub_revision)


def model_name_of(args: TrainingArguments) -> str:
    """The name of the model, for its card: that of the repository, without its owner."""
    return (args.hub_model_id or Path(str(args.output_dir)).absolute().name).rpartition("/")[2]


def init_repository(trainer: Trainer, token: str | None = None, private: bool | None = None) -> None:
    """Make the repository where it is not there; `trainer.hub_model_id` then is its whole name.

    Raises:
        HubError: it could not be done.
    """
    if trainer.is_world_process_zero():
        trainer._repository = repository_of(trainer.args, token, private)
        trainer._repository.open()


def prepare(trainer: Trainer) -> None:
    """Begin with `push_to_hub`: what can never be uploaded is an error now, before time is spent on training.

    A Hub that cannot be reached, or fails, is a warning: it is tried again at each upload.

    Raises:
        HubError: there is no token, it is wrong or may not write there, a name is not allowed, or HF_HUB_OFFLINE is set.
    """
    if not trainer.is_world_process_zero():
        return
    snapshots.drop_leftovers(Path(str(trainer.args.output_dir)))
    try:
        trainer.init_hf_repo()
    except HubError as error:
        if error.refused:
            raise
        logger.warning("%s It is tried again at the first upload.", error)


def after_save(
    trainer: Trainer, writer: loops.AsyncCheckpointer, path: Path, rotate: Callable[[], object]
) -> Callable[[], object]:
    """What to do when a checkpoint is durable: hold it fast for its upload, then delete those that are outdated.

    Whether it is uploaded is decided now, and callbacks hear of it; nothing that fails in an upload stops the run.

    Args:
        trainer: has the arguments.
        writer: is about to write the checkpoint.
        path: the checkpoint.
        rotate: deletes those that are outdated.
    """
    args = trainer.args
    if not args.push_to_hub or args.hub_strategy == HubStrategy.END or not trainer.is_world_process_zero():
        return rotate
    writer.join()  # for the upload before to have begun
    if trainer._uploads.busy and not args.hub_always_push:
        logger.info("%s is not uploaded, because the upload before is still running.", path.name)
        return rotate
    trainer.tell("on_push_begin")
    _describe(trainer)
    repository = trainer._repository or repository_of(args)
    folders, replaced = _checkpoints(args, [path])
    message = _progress(trainer)

    def upload() -> None:
        try:
            taken = snapshots.take(Path(str(args.output_dir)), model=path, folders=folders, replaced=replaced)
            trainer._uploads.begin(Upload(repository, taken, message))
        except Exception as error:  # noqa: BLE001  # the checkpoint is there, and the run goes on
            logger.warning("%s is not uploaded: %s: %s. Training goes on.", path.name, type(error).__name__, error)
        rotate()

    return upload


def push_last(trainer: Trainer) -> None:
    """Upload the final model at the end of training, and wait for all uploads; what fails is a warning.

    With the strategies that upload checkpoints, those go along that were not uploaded because another upload was running.
    """
    args = trainer.args
    if args.push_to_hub and args.hub_strategy != HubStrategy.END and trainer.is_world_process_zero():
        there = checkpoints_in(str(args.output_dir))
        try:
            _begin(trainer, trainer._repository or repository_of(args), "End of training", list(there.values()), warn=True)
        except CallbackError:
            raise
        except Exception as error:  # noqa: BLE001  # the run is over, and its result must not be lost
            logger.warning("The final model was not uploaded: %s: %s. Trainer.push_to_hub does it.", type(error).__name__, error)
    trainer._uploads.wait(_say(args))


def push_saved(trainer: Trainer) -> None:
    """Upload what `save_model` has just written, unless it is a part of an upload or of a checkpoint.

    What fails is a warning, since the model is saved.
    """
    if _SAVING.get():
        return
    try:
        push(trainer, "Model save")
    except HubError as error:
        logger.warning("The model is saved, but was not uploaded: %s", error)


def save_without_push(trainer: Trainer, directory: str | None = None) -> None:
    """Call the trainer's `save_model`, which then uploads nothing, also where a subclass replaced it."""
    token = _SAVING.set(True)
    try:
        trainer.save_model(directory)
    finally:
        _SAVING.reset(token)


def push(
    trainer: Trainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Save the model, write its card and upload both, with everything else in `output_dir` but checkpoints.

    Args:
        trainer: has them.
        commit_message: of the commit.
        blocking: wait for it.
        token: instead of `hub_token`.
        revision: the branch, instead of `hub_revision`.
        private: whether a new repository is private, instead of `hub_private_repo`.
        **card: for `create_model_card`.

    Returns:
        The commit, whose text is its address; its future unless `blocking`. None in other processes than the first.

    Raises:
        HubError: it could not be uploaded; all files are in `output_dir`.
    """
    if not trainer.is_world_process_zero():
        save_without_push(trainer)
        return None
    repository = trainer._repository
    if repository is None or token is not None or private is not None or revision is not None:
        repository = repository_of(trainer.args, token, private)
        repository.revision = revision or repository.revision
        repository.open()
        trainer._repository = trainer._repository or repository
    future = _begin(trainer, repository, commit_message or "End of training", [], warn=not blocking, **card)
    if not blocking:
        return future
    trainer._uploads.wait(_say(trainer.args))
    return future.result()


def _begin(
    trainer: Trainer, repository: Repository, message: str, checkpoints: list[Path], *, warn: bool, **card: Any
) -> Future[CommitInfo]:
    trainer.tell("on_push_begin")
    save_without_push(trainer)
    trainer.create_model_card(**{"model_name": model_name_of(trainer.args)} | card)
    folders, replaced = _checkpoints(trainer.args, checkpoints)
    taken = snapshots.take(Path(str(trainer.args.output_dir)), folders=folders, replaced=replaced)
    return trainer._uploads.begin(Upload(repository, taken, message), warn=warn)


def _checkpoints(args: TrainingArguments, paths: list[Path]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What of the checkpoints goes where in the repository, and which folders it replaces there."""
    if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        return {path.name: path for path in paths}, ()
    if args.hub_strategy == HubStrategy.CHECKPOINT and paths:
        return {LAST: paths[-1]}, (LAST,)
    return {}, ()


def _describe(trainer: Trainer) -> None:
    try:
        trainer.create_model_card(model_name=model_name_of(trainer.args))
    except Exception as error:  # noqa: BLE001  # a card is not worth a run
        logger.warning(
            "The model card could not be written: %s: %s. The upload goes without a new one.", type(error).__name__, error
        )


def _progress(trainer: Trainer) -> str:
    state = trainer.state
    if trainer.args.save_strategy == SaveStrategy.EPOCH and state.epoch is not None:
        return f"Training in progress, epoch {int(state.epoch)}"
    return f"Training in progress, step {state.global_step}"


def _say(args: TrainingArguments) -> Callable[[str], object]:
    return logger.info if args.disable_tqdm else partial(print, file=sys.stderr, flush=True)
