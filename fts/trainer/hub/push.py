"""What a Trainer uploads to the Hub, and when."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fts import loops
from fts.errors import CallbackError, HubError
from fts.loops.checkpoint_list import checkpoints_in
from fts.trainer.arguments import HubStrategy, SaveStrategy, TrainingArguments
from fts.trainer.hub import snapshots
from fts.trainer.hub.repository import Repository
from fts.trainer.hub.session import HubSession, PushableTrainer, PushOptions, model_name_of, repository_of
from fts.trainer.hub.upload_queue import Upload

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

_SAVES_WITHOUT_PUSH: ContextVar[bool] = ContextVar("saves_without_push", default=False)

LAST_CHECKPOINT = "last-checkpoint"
"""The folder in the repository where strategy "checkpoint" keeps the newest one."""


def init_hf_repo(session: HubSession, trainer: PushableTrainer, token: str | None = None, private: bool | None = None) -> None:
    """Create the repository unless it exists; `session.repo_id` is then its full name.

    Raises:
        HubError: it cannot be created or written to.
    """
    if trainer.is_world_process_zero():
        session.repository = repository_of(trainer.args, token, private)
        session.repository.open()


def prepare_push(trainer: PushableTrainer) -> None:
    """Prepare for `push_to_hub`: what can never be uploaded is an error now, before time is spent on training.

    If the Hub cannot be reached or fails, that is a warning; each upload is another attempt.

    Raises:
        HubError: there is no token, it is wrong or has no write access, a name is not allowed, or HF_HUB_OFFLINE is set.
    """
    if not trainer.is_world_process_zero():
        return
    snapshots.delete_stale_snapshots(Path(str(trainer.args.output_dir)))
    try:
        trainer.init_hf_repo()
    except HubError as error:
        if error.refused:
            raise
        logger.warning("%s The first upload is another attempt.", error)


def push_from_checkpoint(
    session: HubSession,
    trainer: PushableTrainer,
    writer: loops.AsyncCheckpointer,
    path: Path,
    rotate: Callable[[], object],
) -> Callable[[], object]:
    """What to do when a checkpoint is durable: take a snapshot for its upload, then delete outdated checkpoints.

    Whether it is uploaded is decided now, and callbacks get `on_push_begin` now. A failing upload never stops the run.

    Args:
        session: has the repository and the uploads.
        trainer: has the arguments.
        writer: is about to write the checkpoint.
        path: the checkpoint.
        rotate: deletes outdated checkpoints.
    """
    args = trainer.args
    if not args.push_to_hub or args.hub_strategy == HubStrategy.END or not trainer.is_world_process_zero():
        return rotate
    writer.join()  # so that the previous upload has begun
    if session.uploads.busy and not args.hub_always_push:
        logger.info("%s is not uploaded, because the previous upload is still running.", path.name)
        return rotate
    trainer._call_event("on_push_begin")
    _try_model_card(trainer)
    repository = session.repository or repository_of(args)
    folders, replaced = _checkpoint_folders(args, [path])
    message = _progress_message(trainer)

    def upload() -> None:
        try:
            snapshot = snapshots.take_snapshot(Path(str(args.output_dir)), model=path, folders=folders, replaced=replaced)
            session.uploads.submit(Upload(repository, snapshot, message))
        except Exception as error:  # noqa: BLE001  # the checkpoint is saved, and the run continues
            logger.warning("%s is not uploaded: %s: %s. Training continues.", path.name, type(error).__name__, error)
        rotate()

    return upload


def push_at_end(session: HubSession, trainer: PushableTrainer) -> None:
    """Upload the final model at the end of training, and wait for all uploads; a failure is a warning.

    With the strategies that upload checkpoints, this includes those that were skipped because another upload was running.
    """
    args = trainer.args
    if args.push_to_hub and args.hub_strategy != HubStrategy.END and trainer.is_world_process_zero():
        checkpoints = list(checkpoints_in(str(args.output_dir)).values())
        options = PushOptions(blocking=False)
        try:
            _submit(session, trainer, session.repository or repository_of(args), options, checkpoints)
        except CallbackError:
            raise
        except Exception as error:  # noqa: BLE001  # the run is over, and its result must not be lost
            logger.warning(
                "The final model was not uploaded: %s: %s. Call Trainer.push_to_hub to upload it.", type(error).__name__, error
            )
    session.uploads.wait_until_done(_report_wait(args))


def push_saved_model(session: HubSession, trainer: PushableTrainer) -> None:
    """Upload what `save_model` has just written, unless it is part of an upload or of a checkpoint.

    A failure is a warning, since the model is saved.
    """
    if _SAVES_WITHOUT_PUSH.get():
        return
    try:
        push_to_hub(session, trainer, PushOptions("Model save"))
    except HubError as error:
        logger.warning("The model is saved, but was not uploaded: %s", error)


def save_without_push(save_model: Callable[..., None], directory: str | None = None) -> None:
    """Call a trainer's `save_model` so that it uploads nothing, also where a subclass overrides it."""
    token = _SAVES_WITHOUT_PUSH.set(True)
    try:
        save_model(directory)
    finally:
        _SAVES_WITHOUT_PUSH.reset(token)


def push_to_hub(session: HubSession, trainer: PushableTrainer, options: PushOptions) -> CommitInfo | Future[CommitInfo] | None:
    """Save the model, write its card and upload both, with everything else in `output_dir` but checkpoints.

    Args:
        session: has the repository and the uploads.
        trainer: has the model.
        options: of this push.

    Returns:
        The commit, a string with its URL; its future unless `blocking`. None on other ranks than the main process.

    Raises:
        HubError: the upload failed; all files are in `output_dir`.
    """
    if not trainer.is_world_process_zero():
        save_without_push(trainer.save_model)
        return None
    repository = session.repository
    if repository is None or options.token is not None or options.private is not None or options.revision is not None:
        repository = repository_of(trainer.args, options.token, options.private)
        repository.revision = options.revision or repository.revision
        repository.open()
        session.repository = session.repository or repository
    future = _submit(session, trainer, repository, options)
    if not options.blocking:
        return future
    session.uploads.wait_until_done(_report_wait(trainer.args))
    return future.result()


def _submit(
    session: HubSession,
    trainer: PushableTrainer,
    repository: Repository,
    options: PushOptions,
    checkpoints: Sequence[Path] = (),
) -> Future[CommitInfo]:
    """Save the model and its card, and submit their upload; an upload that nothing waits for warns where it fails."""
    trainer._call_event("on_push_begin")
    save_without_push(trainer.save_model)
    trainer.create_model_card(**{"model_name": model_name_of(trainer.args)} | options.card)
    folders, replaced = _checkpoint_folders(trainer.args, checkpoints)
    snapshot = snapshots.take_snapshot(Path(str(trainer.args.output_dir)), folders=folders, replaced=replaced)
    return session.uploads.submit(Upload(repository, snapshot, options.message), warn=not options.blocking)


def _checkpoint_folders(args: TrainingArguments, paths: Sequence[Path]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Which checkpoints go to which folder of the repository, and which folders of the repository they replace."""
    if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        return {path.name: path for path in paths}, ()
    if args.hub_strategy == HubStrategy.CHECKPOINT and paths:
        return {LAST_CHECKPOINT: paths[-1]}, (LAST_CHECKPOINT,)
    return {}, ()


def _try_model_card(trainer: PushableTrainer) -> None:
    try:
        trainer.create_model_card(model_name=model_name_of(trainer.args))
    except Exception as error:  # noqa: BLE001  # a card is not worth a run
        logger.warning("The model card could not be written: %s: %s. The upload has no new card.", type(error).__name__, error)


def _progress_message(trainer: PushableTrainer) -> str:
    state = trainer.state
    if trainer.args.save_strategy == SaveStrategy.EPOCH and state.epoch is not None:
        return f"Training in progress, epoch {int(state.epoch)}"
    return f"Training in progress, step {state.global_step}"


def _report_wait(args: TrainingArguments) -> Callable[[str], object]:
    return logger.info if args.disable_tqdm else partial(print, file=sys.stderr, flush=True)
