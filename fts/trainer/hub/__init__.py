"""Uploads to the Hugging Face Hub, beside training."""

from fts.trainer.hub.push import after_save, init_repository, prepare, push, push_last, push_saved, save_without_push
from fts.trainer.hub.repository import Repository
from fts.trainer.hub.uploads import Uploads

__all__ = [
    "Repository",
    "Uploads",
    "after_save",
    "init_repository",
    "prepare",
    "push",
    "push_last",
    "push_saved",
    "save_without_push",
]
