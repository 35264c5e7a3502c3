"""An interrupted and resumed run equals the uninterrupted one, bit for bit."""

import pytest
import torch
from torch import nn

import fts
from fts import loops, steps, transforms as tx
from fts.loops import Position, StepEnd, Stopped, cadence
from tests.loops.datasets import AugmentedDataset, NumberStream

EPOCHS, ITEMS, BATCH = 3, 11, 3
BEGIN = Position()
STEPS = EPOCHS * 4


def training(seed=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 1)).double()
    optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.cosine_schedule(1e-2, warmup_steps=3, total_steps=STEPS)))
    step = steps.train_step(steps.module_loss(net, lambda model, batch: model(batch).square().mean()), optimizer)
    return step, fts.TrainState.create(net, optimizer, seed=seed)


def kept(state):
    return {
        **{f"p.{k}": v.clone() for k, v in state.params.items()},
        **{f"b.{k}": v.clone() for k, v in state.buffers.items()},
        "step": state.step.clone(),
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run(data, start=BEGIN, directory=None, stop=None):
    """Train, from a checkpoint if one is given; stop after `stop` steps if given. The state after each step by number."""
    step, state = training()
    if directory is not None:
        torch.manual_seed(99)  # a new process has other generators
        state, start = loops.load_checkpoint(directory, like=state)
    after = {}
    due = cadence(stop=lambda counters: counters.step == stop)
    for event in loops.fit(step, state, data, epochs=EPOCHS, start=start, due=due):
        if isinstance(event, StepEnd):
            after[event.counters.step] = kept(event.state)
    assert isinstance(event, Stopped)
    return after, event


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["indexable", "iterable", "grouped"])
def test_resume_at_every_step_equals_the_uninterrupted_run(tmp_path, kind, workers):
    def data():
        if kind == "iterable":

            class Rows(NumberStream):
                def __iter__(self):
                    return (torch.stack([x, x.sin(), x.cos(), x / 7]) for x in super().__iter__())

            return loops.source(Rows(ITEMS, random_examples=True), batch_size=BATCH, workers=workers, drop_last=False)
        micro = 2 if kind == "grouped" else 1
        examples = AugmentedDataset(21 if kind == "grouped" else ITEMS)  # 4 steps an epoch, the last one shorter
        return loops.source(examples, batch_size=BATCH, shuffle=True, seed=3, workers=workers, micro_batches=micro)

    full, end = run(data())
    last = max(full)
    assert last >= STEPS
    directory = tmp_path / "checkpoint"
    step, state = training()
    positions = []
    for event in loops.fit(step, state, data(), epochs=EPOCHS, due=cadence()):
        if isinstance(event, StepEnd):
            number = event.counters.step
            positions.append(loops.save_checkpoint(tmp_path / f"checkpoint-{number}", event.state, event.counters.position))
    every = range(1, last + 1) if workers == 0 else range(2, last + 1, 3)  # starting workers takes its time
    for number in every:
        resumed, resumed_end = run(data(), directory=tmp_path / f"checkpoint-{number}")
        assert list(resumed) == list(range(number + 1, last + 1))
        assert all(same(resumed[k], full[k]) for k in resumed)
        assert resumed_end == end
    assert not directory.exists()


def test_workers_do_not_change_a_run():
    runs = [
        run(loops.source(AugmentedDataset(ITEMS), batch_size=BATCH, shuffle=True, workers=workers))[0] for workers in (0, 1, 2)
    ]
    for other in runs[1:]:
        assert all(same(other[k], runs[0][k]) for k in runs[0])


def test_a_stopped_run_resumes_at_the_position_of_its_last_event():
    data = loops.source(AugmentedDataset(ITEMS), batch_size=BATCH, shuffle=True)
    full, _ = run(data)
    for stop in range(1, STEPS):
        step, state = training()
        *_, last = loops.fit(
            step, state, data, epochs=EPOCHS, due=cadence(stop=lambda counters, stop=stop: counters.step == stop)
        )
        assert (last.reason, last.counters.step) == ("due", stop)
        *_, last = loops.fit(step, last.state, data, epochs=EPOCHS, start=last.counters.position)
        assert same(kept(last.state), full[STEPS])


def test_resume_reads_none_of_the_skipped_examples():
    for batch in range(5):
        data = AugmentedDataset(ITEMS)
        step, state = training()
        events = loops.fit(step, state, loops.source(data, batch_size=BATCH, shuffle=True), epochs=2, start=Position(1, batch))
        list(events)
        assert len(data.reads) == max(0, ITEMS - batch * BATCH)
