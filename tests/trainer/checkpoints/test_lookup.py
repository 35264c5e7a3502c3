"""Which checkpoint a run resumes from."""

import os

import pytest

from fts.errors import ArgumentError
from fts.trainer.checkpoints.lookup import find_checkpoint
from tests.trainer.helpers import make_trainer


def test_a_path_whose_replacement_was_interrupted_is_found(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, **options).train()
    path = tmp_path / "checkpoint-3"
    os.rename(path, tmp_path / ".checkpoint-3.replaced")  # a run died between the two renames of a replacement
    trainer = make_trainer(tmp_path, **options)
    assert trainer.train(resume_from_checkpoint=str(path)).global_step == 6
    assert path.is_dir() and not (tmp_path / ".checkpoint-3.replaced").exists()
    with pytest.raises(ArgumentError, match="does not exist"):
        find_checkpoint(tmp_path / "checkpoint-4", tmp_path)
