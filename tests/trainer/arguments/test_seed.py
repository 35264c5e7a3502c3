import os
import random

import numpy as np
import pytest
import torch

from fts.errors import ArgumentError
from fts.trainer.arguments import seed as seeding


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    for name in seeding.DETERMINISTIC:
        monkeypatch.delenv(name, raising=False)
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()


def settings():
    own = {name: os.environ.get(name) for name in seeding.DETERMINISTIC}
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return own, modes, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_numbers_are_those_of_transformers(seed):
    pytest.importorskip("transformers").set_seed(seed)
    wanted = drawn()
    seeding.set_seed(seed)
    assert drawn() == wanted


def test_large_seeds_work_and_wrong_ones_are_named():
    seeding.set_seed(2**40)
    first = drawn()
    seeding.set_seed(2**40)
    assert drawn() == first
    with pytest.raises(ArgumentError, match="seed=-1 must be a whole number"):
        seeding.set_seed(-1)


def test_deterministic_algorithms():
    seeding.set_seed(1)
    assert not torch.are_deterministic_algorithms_enabled()
    seeding.set_seed(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("warn_only", [True, False])
def test_full_determinism_sets_what_transformers_sets(warn_only, monkeypatch):
    theirs = pytest.importorskip("transformers").enable_full_determinism
    found = []
    for function in (theirs, seeding.enable_full_determinism):
        for name in seeding.DETERMINISTIC:
            monkeypatch.setenv(name, "unset")
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
        function(7, warn_only=warn_only)
        found.append((settings(), drawn()))
        torch.use_deterministic_algorithms(False)
    assert found[0] == found[1]
    assert found[1][0][1] == (True, warn_only)
    assert found[1][0][0] == seeding.DETERMINISTIC
