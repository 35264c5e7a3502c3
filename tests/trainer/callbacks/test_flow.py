import itertools
from types import SimpleNamespace

import pytest

from fts.trainer import DefaultFlowCallback, IntervalStrategy, SaveStrategy, TrainerControl, TrainerState

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def asked(flow, event, args, **progress):
    control = TrainerControl()
    getattr(flow, event)(args, TrainerState(**progress), control)
    return [getattr(control, flag) for flag in FLAGS]


@pytest.mark.parametrize("delay", [0, 3, 1.5])
def test_both_flows_request_the_same(delay):
    theirs = pytest.importorskip("transformers").trainer_callback.DefaultFlowCallback()
    ours = DefaultFlowCallback()
    kinds = itertools.product(IntervalStrategy, IntervalStrategy, SaveStrategy, (False, True))
    for logging, evaluation, save, first in kinds:
        args = SimpleNamespace(
            logging_strategy=logging, eval_strategy=evaluation, save_strategy=save, logging_first_step=first, eval_delay=delay
        )
        for step in range(1, 8):
            progress = {
                "global_step": step,
                "max_steps": 7,
                "logging_steps": 3,
                "eval_steps": 2,
                "save_steps": 4,
                "epoch": step / 3,
            }
            for event in ("on_step_end", "on_epoch_end"):
                assert asked(ours, event, args, **progress) == asked(theirs, event, args, **progress)
