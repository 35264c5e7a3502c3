import pytest

from fts.errors import ArgumentError
from fts.loops import Counters, Due, Position, cadence


def test_counters_tell_position_and_progress():
    counters = Counters(step=7, epoch=2, batch=3, steps_per_epoch=4)
    assert counters.position == Position(2, 3)
    assert counters.progress == 2.75
    assert Counters(epoch=2).progress == 2.0
    assert Counters(epoch=2, batch=1).progress is None


def test_intervals_are_counted_in_steps_since_the_start_of_training():
    due = cadence(log=2, evaluate=3, save=6)
    found = {step: due(Counters(step=step, batch=1)) for step in range(1, 7)}
    assert [step for step in found if found[step].log] == [2, 4, 6]
    assert [step for step in found if found[step].evaluate] == [3, 6]
    assert found[6] == Due(log=True, evaluate=True, save=True)
    assert not found[1]


def test_epochs():
    due = cadence(log="epoch", save="epoch")
    assert not due(Counters(step=4, epoch=0, batch=4))
    assert due(Counters(step=4, epoch=1, batch=0, moment="epoch")) == Due(log=True, save=True)
    # at the end only what an incomplete epoch still owes
    assert not due(Counters(step=4, epoch=1, batch=0, moment="end"))
    assert due(Counters(step=6, epoch=1, batch=2, moment="end")) == Due(log=True, save=True)


def test_the_end_is_due_unless_the_last_step_was():
    due = cadence(log=2, evaluate=2, save=2)
    assert due(Counters(step=5, batch=1, moment="end")) == Due(log=True, evaluate=True, save=True)
    assert not due(Counters(step=4, batch=1, moment="end"))
    assert not due(Counters(step=5, moment="epoch"))


def test_an_early_stop_saves_but_does_not_evaluate():
    due = cadence(log=2, evaluate=2, save=2)
    assert due(Counters(step=5, batch=1, moment="stop")) == Due(log=True, save=True)


def test_never_and_stop():
    assert not cadence()(Counters(step=100, moment="end"))
    due = cadence(stop=lambda counters: counters.step >= 3)
    assert [bool(due(Counters(step=step))) for step in (2, 3)] == [False, True]
    assert due(Counters(step=3)).stop


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "step"])
def test_other_intervals_are_refused(every):
    with pytest.raises(ArgumentError, match="save="):
        cadence(save=every)
