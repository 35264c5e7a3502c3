import numpy as np
import pytest
import torch

from fts.errors import ArgumentError
from fts.trainer.evaluation.metrics import check_batch_metrics, parse_metrics


def test_numbers_become_pythons():
    values = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.array(3.0), "d": np.array([4.0]), "e": True, "eval_f": 1}
    found = parse_metrics(values, "eval")
    assert found == {"a": 0.5, "b": 2, "c": 3.0, "d": 4.0, "e": True, "f": 1}
    assert {type(value) for value in found.values()} == {int, float, bool}


@pytest.mark.parametrize("value", ["high", None, [0.5], {"a": 1.0}, np.zeros(2), torch.zeros(2), 1j, np.array("a")])
def test_a_metric_must_be_a_number(value):
    with pytest.raises(ArgumentError, match=r"compute_metrics returned .* for 'f1'.*number"):
        parse_metrics({"accuracy": 1.0, "f1": value}, "eval")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (0.5, "compute_metrics returned float"),
        (None, "compute_metrics returned NoneType"),
        ({3: 1.0}, "a metric named 3"),
        ({"loss": 1.0}, r"returned 'loss'.*Rename"),
        ({"eval_runtime": 1.0}, r"returned 'eval_runtime'.*Rename"),
        ({"f1": 1.0, "eval_f1": 2.0}, r"returned 'eval_f1'.*Rename"),
    ],
)
def test_errors_of_metrics(metrics, message):
    with pytest.raises(ArgumentError, match=message):
        parse_metrics(metrics, "eval")


def test_a_name_that_is_free_can_be_used():
    assert parse_metrics({"loss": 1.0}, "eval", taken=["runtime"]) == {"loss": 1.0}


def test_batch_metrics_need_an_argument():
    check_batch_metrics(None)
    check_batch_metrics(lambda prediction, compute_result=False: {})
    check_batch_metrics(lambda prediction, **kwargs: {})
    with pytest.raises(ArgumentError, match="must take a `compute_result` argument"):
        check_batch_metrics(lambda prediction: {})
