"""Flyte, by a fake of its documented calls."""

import types

from fts.trainer import TrainerState
from fts.trainer.trackers import FlyteCallback
from tests.trainer.helpers import arguments, make_trainer
from tests.trainer.trackers.fake_modules import fake_module

SHORT = {"max_steps": 4, "logging_steps": 2}


def test_flyte_shows_the_logs_and_saves_the_checkpoints(tmp_path, monkeypatch):
    decks, kept = {}, []
    checkpoint = types.SimpleNamespace(save=lambda path: kept.append(sorted(item.name for item in tmp_path.glob("checkpoint-*"))))
    context = types.SimpleNamespace(checkpoint=checkpoint)
    fake_module(monkeypatch, "flytekit", Deck=lambda name, html: decks.update({name: html}), current_context=lambda: context)
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **SHORT, **settings, callbacks=[FlyteCallback]).train()
    assert kept == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]  # each is complete when it is saved to Flyte
    assert decks["Log History"].count("<tr>") == 4 and "train_loss" in decks["Log History"]


def test_flyte_does_nothing_on_other_ranks():
    state = TrainerState(is_world_process_zero=False)
    FlyteCallback().on_save(arguments("unused"), state, None)
    FlyteCallback().on_train_end(arguments("unused"), state, None)
