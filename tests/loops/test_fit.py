from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fts
from fts import loops, steps, transforms as tx
from fts.errors import ArgumentError, DataError, DonatedStateError
from fts.loops import (
    Counters,
    Due,
    EpochBegin,
    EpochEnd,
    EvalBatch,
    Evaluated,
    Logged,
    Position,
    Saved,
    StepBegin,
    StepEnd,
    Stopped,
    cadence,
    fit,
)
from tests.loops.datasets import Count, NumberStream, RecordingDataset, add


def names(events):
    return [type(event).__name__ for event in events]


def never(counters):
    return Due()


def test_the_events_of_a_run():
    data = [1.0, 2.0, 3.0]
    saved = []

    def save(state, position):
        saved.append((state.step, position))
        return Path(f"checkpoint-{state.step}")

    due = cadence(log=2, evaluate=3, save="epoch")
    events = list(fit(add, Count(), data, epochs=2, due=due, evaluate=lambda s: {"total": s.total}, save=save))
    at = [Counters(step, step // 3, step % 3, 6, 3) for step in range(7)]
    end = [None, None, None, Counters(3, 0, 3, 6, 3), None, None, Counters(6, 1, 3, 6, 3)]
    epoch = {step: Counters(step, step // 3, 0, 6, 3, "epoch") for step in (3, 6)}
    state = Count()
    assert events == [
        EpochBegin(at[0], state),
        StepBegin(at[0], state, 1.0), StepEnd(at[1], state, {}),
        StepBegin(at[1], state, 2.0), StepEnd(at[2], state, {}),
        Logged(at[2], {"loss": 1.5}, {"loss": 2.0}, 2),
        StepBegin(at[2], state, 3.0), StepEnd(end[3], state, {}),
        Evaluated(end[3], {"total": 6.0}),
        EpochEnd(end[3], state),
        Saved(epoch[3], Path("checkpoint-3")),
        EpochBegin(at[3], state),
        StepBegin(at[3], state, 1.0), StepEnd(at[4], state, {}),
        Logged(at[4], {"loss": 2.0}, {"loss": 1.0}, 2),
        StepBegin(at[4], state, 2.0), StepEnd(at[5], state, {}),
        StepBegin(at[5], state, 3.0), StepEnd(end[6], state, {}),
        Logged(end[6], {"loss": 2.5}, {"loss": 3.0}, 2),
        Evaluated(end[6], {"total": 12.0}),
        EpochEnd(end[6], state),
        Saved(epoch[6], Path("checkpoint-6")),
        Stopped(Counters(6, 2, 0, 6, 3, "end"), state, "epochs"),
    ]  # fmt: skip
    assert saved == [(3, Position(1, 0)), (6, Position(2, 0))]
    assert events[-1].state == Count(6, 12.0)
    assert [event.batch for event in events if isinstance(event, StepBegin)] == data * 2
    assert [event.state.total for event in events if isinstance(event, StepEnd)] == [1, 3, 6, 7, 9, 12]


def test_total_steps_end_in_the_middle_of_an_epoch_and_log_what_is_left():
    events = list(fit(add, Count(), [1.0, 2.0, 3.0], total_steps=4, due=cadence(log=3)))
    assert names(events[-4:]) == ["StepEnd", "EpochEnd", "Logged", "Stopped"]
    assert events[-3] == EpochEnd(Counters(4, 1, 1, 4, 3), Count(), complete=False)
    assert events[-2] == Logged(Counters(4, 1, 1, 4, 3, "end"), {"loss": 1.0}, {"loss": 1.0}, 1)
    assert events[-1] == Stopped(Counters(4, 1, 1, 4, 3, "end"), Count(), "total_steps")


@pytest.mark.parametrize(
    ("limits", "steps", "reason", "planned"),
    [
        ({}, 3, "epochs", 3),
        ({"epochs": 2}, 6, "epochs", 6),
        ({"total_steps": 5}, 5, "total_steps", 5),
        ({"total_steps": 3}, 3, "total_steps", 3),
        ({"total_steps": 5, "epochs": 1}, 3, "epochs", 3),
        ({"total_steps": 2, "epochs": 9}, 2, "total_steps", 2),
        ({"total_steps": 0}, 0, "total_steps", 0),
        ({"epochs": 0}, 0, "epochs", 0),
    ],
)
def test_whichever_limit_comes_first(limits, steps, reason, planned):
    *_, last = fit(add, Count(), [1.0, 2.0, 3.0], **limits)
    assert (last.state.step, last.reason, last.counters.total_steps) == (steps, reason, planned)


def test_counting_continues_from_the_state_and_the_position():
    events = list(fit(add, Count(step=4, total=7.0), [1.0, 2.0, 3.0], epochs=2, start=Position(1, 1), due=never))
    assert names(events) == ["EpochBegin", "StepBegin", "StepEnd", "StepBegin", "StepEnd", "EpochEnd", "Stopped"]
    assert events[0].counters == Counters(4, 1, 1, 6, 3)
    assert events[-1].state == Count(6, 12.0)


def test_an_epoch_consumed_to_its_end_is_only_closed():
    events = list(fit(add, Count(step=3), [1.0, 2.0, 3.0], epochs=1, start=Position(0, 3), due=cadence(log=1, save="epoch"),
                      save=lambda state, position: Path(str(position.epoch))))  # fmt: skip
    assert names(events) == ["EpochBegin", "EpochEnd", "Saved", "Stopped"]


def test_a_completed_run_has_nothing_left_to_do():
    assert names(fit(add, Count(step=6), [1.0], total_steps=6, start=Position(6, 0))) == ["Stopped"]


def test_due_is_called_after_the_event_was_handled():
    stop = False

    def due(counters):
        return Due(stop=stop)

    seen = []
    for event in fit(add, Count(), [1.0, 2.0, 3.0], epochs=9, due=due):
        seen.append(event)
        if isinstance(event, StepEnd) and event.counters.step == 2:
            stop = True
    assert names(seen[-3:]) == ["StepEnd", "EpochEnd", "Stopped"]
    assert seen[-1] == Stopped(Counters(2, 0, 2, 27, 3, "stop"), Count(), "due")
    assert seen[-2].complete is False


def test_after_a_stop_at_the_last_batch_the_resumed_run_ends_the_epoch():
    options = {"epochs": 2, "evaluate": lambda state: {"x": 1.0}, "save": lambda state, position: Path("checkpoint")}
    due = cadence(evaluate="epoch", save="epoch", stop=lambda counters: counters.step == 3)
    first = list(fit(add, Count(), [1.0, 2.0, 3.0], due=due, **options))
    assert names(first[-3:]) == ["EpochEnd", "Saved", "Stopped"]
    assert first[-1].counters.position == Position(0, 3)
    second = list(fit(add, first[-1].state, [1.0, 2.0, 3.0], start=Position(0, 3), **options))
    assert names(second[:4]) == ["EpochBegin", "EpochEnd", "Evaluated", "Saved"]


def test_a_stop_at_the_planned_last_step_is_no_early_stop():
    due = cadence(stop=lambda counters: counters.step >= 3)
    *_, last = fit(add, Count(), [1.0, 2.0, 3.0], total_steps=3, due=due)
    assert last == Stopped(Counters(3, 1, 0, 3, 3, "end"), Count(), "total_steps")


def test_an_epoch_can_be_ended_early():
    def due(counters):
        return Due(end_epoch=counters.moment == "step" and counters.batch == 2)

    events = list(fit(add, Count(), [1.0, 2.0, 3.0], epochs=2, due=due))
    assert [e.complete for e in events if isinstance(e, EpochEnd)] == [False, False]
    assert events[-1].state == Count(4, 6.0)
    assert events[-1].counters.position == Position(2, 0)


def test_stop_may_be_due_at_the_end_of_an_epoch():
    events = list(fit(add, Count(), [1.0, 2.0], epochs=5, due=lambda counters: Due(stop=counters.moment == "epoch")))
    assert events[-1] == Stopped(Counters(2, 1, 0, 10, 2, "stop"), Count(), "due")


def test_an_evaluation_may_be_events_which_are_passed_on():
    def step(state, batch):
        return {"total": (state.total, 1)}

    def evaluate(state):
        return loops.evaluate(step, state, [1, 2])

    events = list(fit(add, Count(), [1.0, 2.0], evaluate=evaluate))
    at = Counters(2, 1, 0, 2, 2, "epoch")
    assert events[-5:-2] == [EvalBatch(at, 0, 2, {}), EvalBatch(at, 1, 2, {}), Evaluated(at, {"total": 3.0})]


def test_by_default_it_logs_every_50_steps_and_evaluates_and_saves_each_epoch():
    events = list(fit(add, Count(), [1.0] * 60, epochs=2, evaluate=lambda s: {"x": 1.0}, save=lambda s, p: Path("p")))
    assert [e.counters.step for e in events if isinstance(e, Logged)] == [50, 100, 120]
    assert [e.steps for e in events if isinstance(e, Logged)] == [50, 50, 20]
    assert [e.counters.step for e in events if isinstance(e, Evaluated)] == [60, 120]
    assert [e.counters.step for e in events if isinstance(e, Saved)] == [60, 120]


def test_data_of_unknown_length():
    events = list(fit(add, Count(), loops.source(NumberStream(3), batch_size=2), total_steps=3, due=never))
    assert [e.complete for e in events if isinstance(e, EpochEnd)] == [True, False]
    assert events[-1].counters == Counters(3, 1, 1, 3, None, "end")
    assert events[-1].state.total == 0 + 1 + 2 + 1000 + 1001


@pytest.mark.parametrize(
    "data",
    [
        [],
        loops.source(NumberStream(0), batch_size=4),
        loops.source(RecordingDataset(0), batch_size=4, shuffle=True),
        loops.source(RecordingDataset(3), batch_size=4, drop_last=True),
        DataLoader(TensorDataset(torch.zeros(0)), batch_size=4),
        iter(()),
    ],
)
@pytest.mark.parametrize("limits", [{"epochs": 2}, {"total_steps": 5}, {}])
def test_empty_data_is_an_error_and_not_an_endless_loop(data, limits):
    if hasattr(data, "__next__"):
        data = iter(())
    with pytest.raises(DataError, match=r"Epoch 0 of the data has no batch.*examples"):
        list(fit(add, Count(), data, **limits))


def test_data_that_runs_dry_after_an_epoch_is_an_error():
    with pytest.raises(DataError, match="only once"):
        list(fit(add, Count(), iter([1.0, 2.0]), total_steps=5))
    *_, last = fit(add, Count(), iter([1.0, 2.0]), total_steps=2)
    assert last.reason == "total_steps"

    class Once(torch.utils.data.IterableDataset):
        numbers = iter([1.0, 2.0])

        def __iter__(self):
            return self.numbers

    with pytest.raises(DataError, match="Epoch 1 of the data has no batch"):
        list(fit(add, Count(), Once(), total_steps=5))


def test_a_position_beyond_the_epoch_is_an_error():
    with pytest.raises(DataError, match="cannot be resumed at batch 4"):
        list(fit(add, Count(), [1.0, 2.0, 3.0], start=Position(0, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": -1}, "total_steps"),
        ({"epochs": 1.5}, "epochs"),
        ({"start": Position(0, -1)}, "start"),
        ({"due": cadence(save=1)}, "save is due"),
        ({"due": cadence(evaluate="epoch")}, "evaluate is due"),
    ],
)
def test_arguments_are_checked_before_the_first_step(options, message):
    with pytest.raises(ArgumentError, match=message):
        fit(add, Count(), [1.0], **options)


def test_what_is_due_by_another_function_is_checked_when_it_is_due():
    with pytest.raises(ArgumentError, match="evaluate is due"):
        list(fit(add, Count(), [1.0], due=lambda counters: Due(evaluate=True)))


def test_a_batch_is_not_fetched_before_it_is_needed():
    fetched = []

    def batches():
        for batch in (1.0, 2.0, 3.0):
            fetched.append(batch)
            yield batch

    for event in fit(add, Count(), batches(), total_steps=2):
        if isinstance(event, StepEnd):
            assert len(fetched) == event.counters.step
    assert fetched == [1.0, 2.0]


def test_several_states_count_by_the_first():
    def both(states, batch):
        first, metrics = add(states[0], batch)
        return (first, states[1]), metrics

    *_, last = fit(both, (Count(step=3), Count()), [1.0, 2.0], total_steps=4)
    assert last.counters.step == 4
    assert last.state[0].step == 4


# -- with real steps ----------------------------------------------------------------------------------------------------


def regression():
    def loss(params, batch):
        x, y = batch
        return (x @ params["w"] - y).square().mean()

    optimizer = tx.sgd(0.1)
    step = steps.train_step(loss, optimizer)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5]))
    return step, fts.TrainState.create({"w": torch.zeros(3)}, optimizer), data


def test_states_are_donated_unless_asked_otherwise():
    step, state, data = regression()
    batches = loops.source(data, batch_size=4, shuffle=True)
    kept = [e.state for e in fit(step, state, batches, epochs=3, donate=False) if isinstance(e, StepEnd)]
    assert [int(old.step) for old in kept] == [1, 2, 3, 4, 5, 6]
    assert int(state.step) == 0
    given = [e.state for e in fit(step, state, batches, epochs=3) if isinstance(e, StepEnd)]
    assert torch.equal(given[-1].params["w"], kept[-1].params["w"])
    for old in (state, given[0]):
        with pytest.raises(DonatedStateError):
            _ = old.params


def test_the_order_of_plain_data_follows_from_the_seed_of_the_state():
    seen = []

    def look(state, batch):
        seen.extend(batch.tolist())
        return add(state, batch)

    list(fit(look, Count(seed=5), DataLoader(RecordingDataset(6), batch_size=2, shuffle=True), epochs=2))
    expected = [torch.randperm(6, generator=torch.Generator().manual_seed(5 + epoch)).tolist() for epoch in (0, 1)]
    assert seen == expected[0] + expected[1]


def test_fitting_learns_with_the_logged_rate():
    step, state, data = regression()
    events = list(fit(step, state, loops.source(data, batch_size=4), epochs=20, due=cadence(log=10)))
    logs = [e for e in events if isinstance(e, Logged)]
    assert [e.counters.step for e in logs] == [10, 20, 30, 40]
    assert logs[-1].metrics["loss"] < 0.2 * logs[0].metrics["loss"]
    assert logs[0].last["lr"] == pytest.approx(0.1)


def test_micro_batches_make_the_step_of_the_full_batch():
    step, state, data = regression()

    def run(**options):
        *_, last = fit(step, state, loops.source(data, shuffle=True, **options), epochs=2, donate=False)
        assert last.counters.step == 4
        return last.state.params["w"]

    torch.testing.assert_close(run(batch_size=2, micro_batches=2), run(batch_size=4))
