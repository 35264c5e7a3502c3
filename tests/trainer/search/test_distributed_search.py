"""A search on two ranks, started by torchrun, has the results of one process."""

import importlib.util
import json
import time

import pytest

from tests import torchrun
from tests.trainer.search.distributed_search import run_search

SCRIPT = torchrun.ROOT / "tests" / "trainer" / "search" / "distributed_search.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return torchrun.results(SCRIPT, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return json.loads(json.dumps(run_search(tmp_path_factory.mktemp("single"), 1)))


def test_all_return_the_best_run_of_the_study(found, single):
    best = found[0]["best"]
    assert found[1]["best"] == best
    expected = single["best"]
    assert (best["run_id"], best["hyperparameters"]) == (expected["run_id"], expected["hyperparameters"])
    assert best["objective"] == pytest.approx(expected["objective"], rel=1e-5)


def test_each_rank_trains_every_trial_until_the_study_ends_it(found, single):
    names = ["trial 0", "trial 1", "trial 3"]
    for process in (*found, single):
        assert [[name, steps, folder] for name, _, steps, folder in process["seen"]] == [
            [name, steps, name] for name, steps in zip(names, (9, 6, 9), strict=True)
        ]
        assert [params for _, params, *_ in process["seen"]] == [params for _, params, *_ in single["seen"]]


def test_the_main_process_has_the_study(found, single):
    assert found[1]["study"] == []
    states = [state for state, *_ in found[0]["study"]]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE"] == [state for state, *_ in single["study"]]
    for (_, values, reported), (_, expected, expected_reports) in zip(found[0]["study"], single["study"], strict=True):
        assert (values or []) == pytest.approx(expected or [], rel=1e-5)  # a failed trial has none
        assert reported == pytest.approx(expected_reports, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("space", "ZeroDivisionError: division by zero"),
        ("objective", "ZeroDivisionError: division by zero"),
        ("catch", "ArgumentError: catch="),
        ("option", "ArgumentError: Neither hyperparameter_search"),
    ],
)
def test_an_error_on_the_main_process_is_raised_on_all_ranks(found, case, message):
    assert found[0][case].startswith(message)
    assert found[1][case].startswith("DistributedError") and message in found[1][case]


def test_a_search_that_failed_leaves_the_processes_able_to_search(found):
    assert found[0]["again"] == found[1]["again"] == found[0]["best"]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_starts_its_own_processes(found):
    for process in found:
        assert "Ray starts a process for each trial itself, but 2 processes were started" in process["ray"]


def test_an_error_on_one_rank_ends_all(tmp_path):
    begun = time.monotonic()
    done = torchrun.start(SCRIPT, tmp_path, 1)
    assert done.returncode != 0
    assert "ValueError: only on one rank" in done.stderr
    assert not list(tmp_path.glob("*.json"))
    assert time.monotonic() - begun < 55  # no rank has waited for ddp_timeout
