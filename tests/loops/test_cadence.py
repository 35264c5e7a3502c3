import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from fts.errors import ArgumentError
from fts.loops import Counters, Due, Position, Saved, cadence, every_interval, fit


def test_counters_have_position_and_progress():
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


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "step", "0s", "20", timedelta(0), timedelta(seconds=-1)])
def test_other_intervals_are_errors(every):
    with pytest.raises(ArgumentError, match="save="):
        cadence(save=every)


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_saving_by_time_with_steps_and_epochs():
    clock = Clock()
    due = cadence(log=2, evaluate="epoch", save="20min", clock=clock)
    found = {}
    for step in range(1, 10):  # five minutes a step
        clock.now += 300
        found[step] = due(Counters(step=step, batch=step))
    assert [step for step in found if found[step].save] == [4, 8]
    assert [step for step in found if found[step].log] == [2, 4, 6, 8]
    assert not any(found[step].evaluate for step in found)


def test_the_time_of_the_last_save_begins_the_next_interval():
    clock = Clock()
    due = cadence(save=timedelta(seconds=10), clock=clock)
    clock.now += 17  # one long step
    assert due(Counters(step=1)).save
    clock.now += 9
    assert not due(Counters(step=2)).save  # 26 s after the beginning, but 9 after the save
    clock.now += 1
    assert due(Counters(step=3)).save


def test_intervals_of_time_are_independent():
    clock = Clock()
    due = cadence(log="30s", save="50s", clock=clock)
    found = []
    for step in range(1, 16):
        clock.now += 10
        wanted = due(Counters(step=step))
        found.append((wanted.log, wanted.save))
    assert [step for step, (log, _) in enumerate(found, 1) if log] == [3, 6, 9, 12, 15]
    assert [step for step, (_, save) in enumerate(found, 1) if save] == [5, 10, 15]


@pytest.mark.parametrize("moment", ["end", "stop"])
def test_a_run_that_saves_by_time_saves_its_last_step_once(moment):
    clock = Clock()
    due = cadence(save="1 min", clock=clock)
    assert not due(Counters(step=5)).save
    assert not due(Counters(step=5, epoch=1, moment="epoch")).save
    assert due(Counters(step=5, moment=moment)).save
    clock.now += 60
    assert due(Counters(step=6)).save
    assert not due(Counters(step=6, moment=moment)).save


def test_processes_agree_on_the_step_of_a_save_by_time():
    clocks = [Clock(), Clock()]
    answers: list[int] = []

    def agree(over):  # the greatest of both, as an all-reduce gives it
        answers.append(over)
        return max(int(clock.now - 100 >= 10) for clock in clocks)

    dues = [cadence(save="10s", clock=clock, agree=agree) for clock in clocks]
    clocks[0].now += 12  # the other is behind
    clocks[1].now += 8
    assert [due(Counters(step=1)).save for due in dues] == [True, True]
    assert answers == [1, 0]


def test_two_processes_save_at_the_same_steps(tmp_path):
    program = Path(__file__).with_name("run_cadence.py")
    words = [sys.executable, str(program), str(tmp_path / "rendezvous")]
    both = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    # 4 steps of 3 s are more than 10 s; alone, the slower clock would save after 5
    assert [process.communicate()[0].split() for process in both] == [["4", "8", "11"], ["4", "8", "11"]]


def test_fit_saves_by_time(tmp_path):
    clock = Clock()

    def step(state, batch):
        clock.now += 4
        return state + 1, {}

    due = cadence(save="10s", clock=clock)
    events = fit(step, 0, range(8), due=due, save=lambda state, position: tmp_path / f"checkpoint-{state}")
    assert [event.path.name for event in events if isinstance(event, Saved)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


def test_a_timer_stays_due_until_it_is_reset():
    clock = Clock()
    timer = every_interval(timedelta(minutes=1), clock=clock)
    clock.now += 61
    assert timer.due() and timer.due()
    timer.reset()
    assert not timer.due()


@pytest.mark.parametrize("interval", [0, "0s", -1, "soon", None])
def test_other_intervals_of_time_are_errors(interval):
    with pytest.raises(ArgumentError, match=re.escape(repr(interval))):
        every_interval(interval)
