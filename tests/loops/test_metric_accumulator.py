import math

import pytest
import torch

from fts.loops import metric_accumulator
from fts.loops.metric_accumulator import MetricAccumulator


def test_means_and_last_values():
    accumulator = MetricAccumulator()
    for value in (1.0, 2.0, 6.0):
        accumulator.add(
            {"loss": torch.tensor(value), "lr": torch.tensor(value / 10, dtype=torch.float64), "count": torch.tensor(7)}
        )
    means, last, steps = accumulator.read()
    assert means == {"loss": 3.0, "lr": pytest.approx(0.3), "count": 7.0}
    assert last == {"loss": 6.0, "lr": 0.6, "count": 7.0}
    assert steps == 3
    assert accumulator.read() == ({}, {}, 0)


def test_a_metric_of_some_steps_is_averaged_over_those():
    accumulator = MetricAccumulator()
    accumulator.add({"a": torch.tensor(1.0)})
    accumulator.add({"a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    accumulator.add({"b": 7.0, "vector": torch.zeros(3), "flag": torch.tensor(True)})
    assert accumulator.read() == ({"a": 2.0, "b": 6.0, "flag": 1.0}, {"b": 7.0, "flag": 1.0}, 3)


def test_nan_is_not_hidden_and_graphs_are_not_read():
    accumulator = MetricAccumulator()
    accumulator.add({"loss": torch.tensor(1.0, requires_grad=True) * 2})
    accumulator.add({"loss": torch.tensor(math.nan)})
    assert math.isnan(accumulator.read()[0]["loss"])


def test_means_are_exact_where_float32_is_not():
    accumulator = MetricAccumulator()
    for value in (2**24, 1, 1):
        accumulator.add({"x": torch.tensor(float(value))})
    assert accumulator.read()[0]["x"] == (2**24 + 2) / 3


def test_few_steps_are_kept(monkeypatch):
    monkeypatch.setattr(metric_accumulator, "MAX_PENDING_STEPS", 4)
    accumulator = MetricAccumulator()
    most_pending = 0
    for value in range(10):
        accumulator.add({"x": torch.tensor(float(value))})
        most_pending = max(most_pending, len(accumulator._pending))
    assert most_pending < 4
    assert accumulator.read() == ({"x": 4.5}, {"x": 9.0}, 10)


def test_metrics_of_other_devices_are_checked_step_by_step(monkeypatch):
    monkeypatch.setattr(metric_accumulator, "_on_device", lambda value: True)
    seen = []
    accumulator = MetricAccumulator(check=seen.append)
    accumulator.add({"skipped": torch.tensor(1)})
    accumulator.add({"skipped": torch.tensor(0), "loss": torch.tensor(2.0), "vector": torch.zeros(2)})
    assert seen == []
    accumulator.read()
    assert seen == [{"skipped": torch.tensor(1)}, {"skipped": torch.tensor(0), "loss": torch.tensor(2.0)}]
    assert seen[0]["skipped"].dtype == torch.int64


def test_cpu_metrics_are_left_to_the_step():
    accumulator = MetricAccumulator(check=lambda metrics: pytest.fail("checked"))
    accumulator.add({"loss": torch.tensor(1.0)})
    accumulator.read()
