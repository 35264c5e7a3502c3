import pytest
import torch

from fts.errors import ArgumentError
from fts.trainer import default_compute_objective
from fts.trainer.search.objective import TrialReporter, check_objective

SPEED = {"eval_runtime": 3.0, "eval_samples_per_second": 5.0, "eval_steps_per_second": 7.0, "epoch": 2.0}


@pytest.mark.parametrize(
    "metrics",
    [
        {"eval_loss": 0.5},
        {"eval_loss": 0.5, "eval_accuracy": 0.25, "eval_f1": 0.125},
        {"eval_accuracy": 0.25},
        {"eval_loss": 0.5, "eval_a_loss": 1.0, "eval_a_runtime": 3.0, "eval_b_loss": 2.0},
    ],
)
def test_the_default_is_that_of_transformers(metrics):
    theirs = pytest.importorskip("transformers.trainer_utils").default_compute_objective
    assert default_compute_objective(metrics | SPEED) == theirs(metrics | SPEED)


def test_speed_memory_and_counters_are_left_out():
    others = SPEED | {"eval_mem_cpu_alloc_delta": 1e9, "num_input_tokens_seen": 100}
    assert default_compute_objective({"eval_loss": 0.5} | others) == 0.5
    with pytest.raises(ArgumentError, match="no loss and no other metric"):
        default_compute_objective(others)


def test_objectives_are_numbers():
    assert check_objective(torch.tensor(2.0), 1) == 2.0
    assert check_objective([1, torch.tensor(2.0)], 2) == [1.0, 2.0]
    for value, count in ((None, 1), ("high", 1), ({"loss": 1.0}, 1), ([1.0, 2.0], 1), (1.0, 2), ([1.0, None], 2)):
        with pytest.raises(ArgumentError, match="compute_objective returned"):
            check_objective(value, count)


def test_compute_objective_cannot_change_the_metrics():
    metrics = {"eval_loss": 0.5}
    pop_loss = lambda given: given.pop("eval_loss")  # noqa: E731
    reporter = TrialReporter(pop_loss, 1, lambda objective, reported, step: reported["eval_loss"] < 1)
    assert reporter(metrics, 3) and reporter.objective == 0.5 and metrics == {"eval_loss": 0.5}
