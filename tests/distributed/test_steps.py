"""A step of several processes equals that of one process with all their micro-batches."""

from pathlib import Path

import pytest

from tests.torchrun import results

SCRIPT = Path(__file__).with_name("run_steps.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results(SCRIPT, tmp_path_factory.mktemp("two"))


def test_two_processes_equal_one_over_fifty_steps(two):
    check(two)


def test_all_ranks_report_the_same(two):
    one, other = two
    assert {name: found["metrics"] for name, found in one.items()} == {name: found["metrics"] for name, found in other.items()}


@pytest.mark.fuzz
def test_four_processes_equal_one(tmp_path):
    check(results(SCRIPT, tmp_path, processes=4, timeout=900))


def check(found):
    ways = {name.partition(" ")[0] for name in found[0]}
    assert ways == {"ddp", "fsdp", "func", "compiled", "plain", "ddp-each", "fsdp-each", "ddp-unused", "ddp-static"}
    for name, differences in found[0].items():
        limit = 2e-5 if "float32" in name else 1e-9
        assert differences["params"] < limit, (name, differences)
        assert differences["metrics"] < limit, (name, differences)
