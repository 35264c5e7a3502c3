"""Methods of a subclass that decide on numbers of a run."""

import logging

from fts.trainer import Trainer
from fts.trainer.run.overrides import overridden
from tests.trainer.helpers import Linear, arguments, make_examples


def made(kind, tmp_path, **changes):
    return kind(Linear(), arguments(tmp_path, **changes), train_dataset=make_examples(22))


def test_what_is_set_on_an_instance_is_overridden(tmp_path):
    trainer = made(Trainer, tmp_path)
    assert not overridden(trainer, "log", "compute_loss")
    trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs)["loss"]
    assert overridden(trainer, "log", "compute_loss")


def test_initial_values_decide_on_updates_and_epochs(tmp_path):
    class Shorter(Trainer):
        def set_initial_training_values(self, args, dataloader, total_train_batch_size=None):
            values = list(super().set_initial_training_values(args, dataloader, total_train_batch_size))
            assert values[1:] == [6, 22, 66.0, True, 6, 18]
            values[-1] = 4
            return tuple(values)

    trainer = made(Shorter, tmp_path)
    assert trainer.train().global_step == 4
    assert trainer.state.max_steps == 4
    assert trainer.plan().total_steps == 4


def test_numbers_that_are_announced(tmp_path, caplog):
    class Counted(Trainer):
        def num_examples(self, dataloader):
            return 1234

        def get_total_train_batch_size(self, args):
            return 77

    with caplog.at_level(logging.INFO, "fts"):
        made(Counted, tmp_path, max_steps=1).train()
    assert "Num examples = 1234" in caplog.text
    assert "accumulation) = 77" in caplog.text
