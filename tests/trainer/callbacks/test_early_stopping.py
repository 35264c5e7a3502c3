import logging
import math

import pytest

from fts.errors import ArgumentError
from fts.trainer import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments
from fts.trainer.evaluation.best_model import update_best_metric
from tests.trainer.helpers import make_trainer

transformers = pytest.importorskip("transformers")


def stops(stopper, values, **arguments):
    args = TrainingArguments(metric_for_best_model="loss", eval_strategy="epoch", **arguments)
    state, found = TrainerState(), []
    better = max if args.greater_is_better else min
    for number, value in enumerate(values):
        control = TrainerControl()
        stopper.on_evaluate(args, state, control, metrics={"eval_loss": value})
        state.best_metric = value if state.best_metric is None else better(value, state.best_metric)
        found.append((number, control.should_training_stop, stopper.early_stopping_patience_counter))
    return found


@pytest.mark.parametrize(("values", "end"), [([3, 2, 1, 0], None), ([1, 2, 3, 0], 2), ([3.0, 2.95, 2.9, 1.0], 2)])
def test_early_stopping_counts(values, end):
    found = stops(EarlyStoppingCallback(2, early_stopping_threshold=0.2), values)
    assert next((number for number, stopped, _ in found if stopped), None) == end


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_it_counts_as_transformers_does(greater, threshold):
    values = [1.0, 1.5, 1.25, 0.5, 0.5, 0.25, 2.0, 1.0]
    ours = stops(EarlyStoppingCallback(2, threshold), values, greater_is_better=greater)
    assert ours == stops(transformers.EarlyStoppingCallback(2, threshold), values, greater_is_better=greater)


def test_nan_is_no_progress():
    stopper = EarlyStoppingCallback(2)
    args, state = TrainingArguments(metric_for_best_model="loss", eval_strategy="epoch"), TrainerState()
    counts = []
    for value in (math.nan, 3.0, math.nan, 2.0, math.nan, math.nan):
        control = TrainerControl()
        stopper.on_evaluate(args, state, control, metrics={"eval_loss": value})
        update_best_metric(args, state, {"eval_loss": value})
        counts.append((stopper.early_stopping_patience_counter, control.should_training_stop))
    assert counts == [(1, False), (0, False), (1, False), (0, False), (1, False), (2, True)]


def test_the_rule_may_be_overridden():
    class Never(EarlyStoppingCallback):
        def check_metric_value(self, args, state, control, metric_value):
            self.early_stopping_patience_counter = 0

    assert not any(stopped for _, stopped, _ in stops(Never(1), [1, 2, 3]))


@pytest.mark.parametrize("kind", [EarlyStoppingCallback, transformers.EarlyStoppingCallback])
def test_it_ends_a_run(kind, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "max_steps": 9, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, callbacks=[kind(3)], **settings)
    assert trainer.train().global_step == 4


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"eval_strategy": "epoch"}, "needs metric_for_best_model"), ({"metric_for_best_model": "loss"}, "needs evaluations")],
)
def test_it_says_what_it_needs(settings, text, tmp_path):
    with pytest.raises(ArgumentError, match=text):
        make_trainer(tmp_path, callbacks=[EarlyStoppingCallback], **settings).train()


def test_a_missing_metric_is_warned_of(caplog):
    args = TrainingArguments(metric_for_best_model="loss", eval_strategy="epoch")
    with caplog.at_level(logging.WARNING):
        EarlyStoppingCallback().on_evaluate(args, TrainerState(), TrainerControl(), metrics={"eval_f1": 1.0})
        EarlyStoppingCallback().on_train_begin(args, TrainerState(), TrainerControl())
    assert "Early stopping found no eval_loss in ['eval_f1']" in caplog.text
    assert "training ends with the last weights" in caplog.text
