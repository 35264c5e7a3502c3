import pickle

import pytest

from fts.errors import CallbackError
from fts.trainer import TrainerState
from fts.trainer.callbacks import callback_error


class Code(Exception):
    def __init__(self, code, where):
        super().__init__(code, where)
        self.code = code

    def __str__(self):
        return f"code {self.code}"


class Refuses(Exception):
    def __init_subclass__(cls):
        raise TypeError("final")


ERRORS = [ValueError("no"), KeyError("k"), Code(3, "there"), OSError(2, "gone"), UnicodeDecodeError("utf-8", b"x", 0, 1, "odd")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_error_is_of_both_classes(error):
    named = callback_error(TrainerState(), "on_log", TrainerState(global_step=7), error)
    assert isinstance(named, CallbackError) and isinstance(named, type(error))
    assert str(named) == f"TrainerState.on_log failed at step 7: {type(error).__name__}: {error}"
    assert vars(named) == vars(error)
    assert type(named).__name__ == "CallbackError"


def test_a_class_that_cannot_be_combined():
    named = callback_error(TrainerState(), "on_log", None, Refuses("no"))
    assert type(named) is CallbackError
    assert str(named) == "TrainerState.on_log failed at step 0: Refuses: no"


def test_an_inner_failure_keeps_its_name():
    inner = callback_error(TrainerState(), "on_evaluate", None, ValueError("no"))
    assert callback_error(object(), "on_step_end", None, inner) is inner


def test_the_error_crosses_processes():
    named = pickle.loads(pickle.dumps(callback_error(TrainerState(), "on_log", None, ValueError("no"))))  # noqa: S301
    assert type(named) is CallbackError
    assert str(named) == "TrainerState.on_log failed at step 0: ValueError: no"
