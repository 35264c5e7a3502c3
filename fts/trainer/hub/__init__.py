"""Uploads to the Hugging Face Hub, asynchronously: what is pushed when, snapshots of what is pushed, and the queue of uploads.

Uses `arguments` and `callbacks` of the trainer, and `fts.loops`.
"""

from fts.trainer.hub.hub_mixin import HubMixin
from fts.trainer.hub.push import (
    init_hf_repo,
    prepare_push,
    push_at_end,
    push_from_checkpoint,
    push_saved_model,
    push_to_hub,
    save_without_push,
)
from fts.trainer.hub.session import HubSession, PushableTrainer, PushOptions
from fts.trainer.hub.upload_queue import UploadQueue

__all__ = [
    "HubMixin",
    "HubSession",
    "PushOptions",
    "PushableTrainer",
    "UploadQueue",
    "init_hf_repo",
    "prepare_push",
    "push_at_end",
    "push_from_checkpoint",
    "push_saved_model",
    "push_to_hub",
    "save_without_push",
]
