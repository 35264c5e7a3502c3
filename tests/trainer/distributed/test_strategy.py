"""A run under each strategy equals that of one process; the processes are real, started by torchrun."""

from pathlib import Path

import pytest

from tests import torchrun

SCRIPT = Path(__file__).with_name("run_strategies.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return torchrun.result(SCRIPT, tmp_path_factory.mktemp("strategies") / "alone.json", processes=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return torchrun.result(SCRIPT, tmp_path_factory.mktemp("strategies") / "found.json")


# name -> units of FSDP, and which share of the parameters each process has
CASES = {
    "ddp": (0, 1),
    "ddp, accumulating": (0, 1),
    "fsdp": (3, 0.5),
    "fsdp, by size, recomputing": (7, 0.5),
    "fsdp, accumulating": (3, 0.5),
    "fsdp of the launcher": (3, 0.5),
    "matrices": (0, 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_two_processes_equals_that_of_one(found, alone, name):
    case, expected = found[name], alone[name]
    for metric in ("losses", "norms"):
        assert len(case[metric]) == 5
        assert case[metric] == pytest.approx(expected[metric], rel=1e-5)
    assert case["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
    assert case["examples"] == expected["examples"] == 8
    units, share = CASES[name]
    assert case["units"] == units
    assert case["share"] == pytest.approx(share, abs=0.01)
    assert case["sizes"] == [2 if name == "matrices" else 1, 1, 1]


@pytest.mark.parametrize("name", ["evaluated", "evaluated in matrices"])
def test_a_model_that_was_not_trained_is_sharded_before_it_is_evaluated(found, alone, name):
    *losses, share = found[name]
    *expected, full = alone[name]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert (share, full) == pytest.approx((0.5, 1), abs=0.01)


def test_ddp_is_given_its_arguments(found):
    options = found["given"]["DDP"]
    assert options["find_unused_parameters"] == "False"
    assert found["given"]["buffers"] is False
    assert float(options["bucket_cap_mb"]) == 3
    assert options["static_graph"] == "True"


def test_the_group_is_given_its_arguments(found):
    assert found["given"]["group"]["timeout"] == "0:01:17"


def test_what_these_processes_cannot_do_is_said_at_once(found):
    assert "cp_size=2: context parallelism needs torch's ring attention, which runs on CUDA GPUs alone" in found["cp"]
    assert "sp_size=2: sequence parallelism is a part of DeepSpeed" in found["sp"]
    assert "auto_find_batch_size=True in 2 processes" in found["batch size"]
    assert "2 processes cannot be divided into groups of 3 (tp_size=3" in found["tp"]
