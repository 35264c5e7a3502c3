"""Transforms on sharded tensors equal those on full ones. `run_sharded.py` is what the processes run."""

from pathlib import Path

import pytest

from tests import torchrun
from tests.laws.test_transforms import EAGER_REGISTRY, NAMED_REGISTRY, REGISTRY

SCRIPT = Path(__file__).with_name("run_sharded.py")


def wrong_in(results: list[dict[str, str]]) -> dict[str, str]:
    return {
        f"{name}, process {rank}": problem for rank, found in enumerate(results) for name, problem in found.items() if problem
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return torchrun.results(SCRIPT, tmp_path_factory.mktemp("two"), processes=2, timeout=840)


def test_two_ranks_equal_one(results) -> None:
    assert wrong_in(results) == {}


def test_everything_was_checked(results) -> None:
    """The registry of the laws, where a test finds a public transform that is missing."""
    assert all(len(found) > len(REGISTRY + NAMED_REGISTRY + EAGER_REGISTRY) for found in results)


@pytest.mark.fuzz
def test_four_ranks_equal_one(tmp_path) -> None:
    assert wrong_in(torchrun.results(SCRIPT, tmp_path, processes=4, timeout=1_700)) == {}
