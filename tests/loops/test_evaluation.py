import math

import pytest
import torch
from torch.utils.data import TensorDataset

import fts
from fts import steps, transforms as tx
from fts.distributed import Group
from fts.errors import ArgumentError, BatchError, DataError
from fts.loops import Counters, EvalBatch, Evaluated, evaluate, shard_source, source
from tests.loops.datasets import NumberStream

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(101, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 2, (101,), generator=GENERATOR)


def metrics_of(batch_size, step):
    *_, last = evaluate(step, None, source(TensorDataset(X, Y), batch_size=batch_size))
    return last.metrics


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_metrics_do_not_depend_on_the_batch_size(as_tensor):
    def step(state, batch):
        x, y = batch
        rows = torch.tensor(len(x)) if as_tensor else len(x)
        positive = y.sum() if as_tensor else int(y.sum())
        of_positive = x[y == 1].mean()  # NaN in a batch without any
        return {"mean": (x.mean(), rows), "mean of positive": (of_positive, positive), "one": (1.0, rows)}

    full = {"mean": X.mean().item(), "mean of positive": X[Y == 1].mean().item(), "one": 1.0}
    for batch_size in (1, 7, 64, 101):
        assert metrics_of(batch_size, step) == pytest.approx(full, rel=1e-12)


def test_sums_are_kept_in_float64():
    def step(state, batch):
        return {"x": (batch, 1)}

    *_, last = evaluate(step, None, [torch.tensor(2.0**24), torch.tensor(1.0), torch.tensor(1.0)])
    assert last.metrics == {"x": (2**24 + 2) / 3}


def test_the_events():
    def step(state, batch):
        return {"x": (batch, 2)}

    events = list(evaluate(step, None, [torch.tensor(1.0), torch.tensor(3.0)], counters=Counters(9)))
    assert events == [EvalBatch(Counters(9), 0, 2, {}), EvalBatch(Counters(9), 1, 2, {}), Evaluated(Counters(9), {"x": 2.0})]
    assert events[0].metrics == {"x": (torch.tensor(1.0), 2)}


def test_nothing_to_average_is_nan():
    *_, last = evaluate(lambda state, batch: {"x": (torch.tensor(1.0), 0)}, None, [1])
    assert math.isnan(last.metrics["x"])
    *_, last = evaluate(lambda state, batch: {"x": (torch.tensor(1.0), torch.tensor(0))}, None, [1])
    assert math.isnan(last.metrics["x"])


def test_a_diverged_metric_is_not_hidden():
    *_, last = evaluate(lambda state, batch: {"x": (torch.tensor(batch), 1)}, None, [1.0, math.nan])
    assert math.isnan(last.metrics["x"])


def test_wrong_results_and_empty_data_are_errors():
    with pytest.raises(BatchError, match=r"Tensor for 'loss'.*\(mean, weight\)"):
        list(evaluate(lambda state, batch: {"loss": torch.tensor(1.0)}, None, [1]))
    with pytest.raises(BatchError, match=r"shape \[2\]"):
        list(evaluate(lambda state, batch: {"loss": (torch.zeros(2), 1)}, None, [1]))
    for empty in ([], source(NumberStream(0), batch_size=2), iter(())):
        with pytest.raises(DataError, match="has no batch"):
            list(evaluate(lambda state, batch: {}, None, empty))


def test_with_an_eval_step():
    state = fts.TrainState.create({"w": torch.ones(5, dtype=torch.float64)}, tx.identity())
    step = steps.eval_step(lambda params, batch: (batch[0] @ params["w"]).square().mean())
    full = (X.sum(1)).square().mean().item()
    for batch_size in (1, 7, 64):
        *_, last = evaluate(step, state, source(TensorDataset(X, Y), batch_size=batch_size))
        assert last.metrics == {"loss": pytest.approx(full, rel=1e-12)}
        assert last.counters == Counters(0)


def test_processes_without_a_sharded_source_are_an_error():
    with pytest.raises(ArgumentError, match="a group of 2 processes, and data that is sharded over 1"):
        evaluate(lambda state, batch: {}, None, [torch.ones(1)], group=Group(size=2))


def test_what_only_keeps_processes_in_step_is_not_counted():
    full = source([torch.tensor(1.0), torch.tensor(3.0), torch.tensor(8.0)])
    events = [list(evaluate(lambda state, batch: {"x": (batch, 1)}, None, shard_source(full, rank, 2))) for rank in (0, 1)]
    assert [[type(event) for event in found] for found in events] == [[EvalBatch, EvalBatch, Evaluated], [EvalBatch, Evaluated]]
    assert [found[-1].metrics for found in events] == [{"x": 4.5}, {"x": 3.0}]
