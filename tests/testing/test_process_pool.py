"""Checks in several processes find mistakes, and processes that fail do not hang."""

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.testing import LawError, check_sharded_transform
from fts.testing.process_pool import process_pool
from fts.testing.sharded import sharded_equals_full
from fts.typing import Transform


def clipped_adamw() -> Transform:
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.1))


def clips_local_norm() -> Transform:
    """Clips by the norm of the local shard, without an all-reduce."""

    def update(grads, state, params):
        from fts.dtensors import to_local

        norm = torch.stack([to_local(g).norm() for g in grads.values()]).norm()
        return {name: g / (1 + norm) for name, g in grads.items()}, state, {}

    return Transform(lambda params: (), update, label="clips_local_norm")


def keeps_local_moment() -> Transform:
    """A moment that is no DTensor, so that a checkpoint could not tell which shard it is."""

    def init(params):
        from fts.dtensors import to_local

        return {name: torch.zeros_like(to_local(p)) for name, p in params.items()}

    return Transform(init, lambda grads, state, params: (grads, state, {}), label="keeps_local_moment")


def reports_rank() -> Transform:
    def update(grads, state, params):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return grads, state, {"rank": torch.tensor(float(rank))}

    return Transform(lambda params: (), update, label="reports_rank")


def rank_and_sum(value: float) -> tuple[int, float]:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def second_one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("not today")
    dist.barrier()


def second_one_ends() -> None:
    if dist.get_rank() == 1:
        os._exit(1)
    dist.barrier()


@pytest.fixture(scope="module")
def run():
    with process_pool(2) as run:
        yield run


def test_a_transform_of_fts_passes() -> None:
    check_sharded_transform(clipped_adamw)


@pytest.mark.fuzz
def test_a_transform_of_fts_passes_in_four_processes() -> None:
    check_sharded_transform(clipped_adamw, processes=4)


def check_law(make) -> None:
    tree = {"w": torch.ones(3, 4, dtype=torch.float64)}
    sharded_equals_full(make(), tree, [tree])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (clips_local_norm, "clips_local_norm, fsdp, breaks .*: update's result of update 1"),
        (keeps_local_moment, "keeps_local_moment, fsdp, breaks .*: update's state of update 1"),
        (reports_rank, "reports_rank, fsdp, breaks .*: update reports .* on rank"),
    ],
)
def test_mistakes_are_found(run, make, words: str) -> None:
    with pytest.raises(LawError, match=words):
        run(check_law, make)


@pytest.mark.fuzz
def test_a_mistake_is_found_on_generated_examples() -> None:
    with pytest.raises(LawError, match="clips_local_norm"):
        check_sharded_transform(clips_local_norm)


def test_processes_run_functions_and_survive_failures(run) -> None:
    assert run(rank_and_sum, 2.0) == [(0, 6.0), (1, 6.0)]
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="not today"):
        run(second_one_fails)
    with pytest.raises(RuntimeError):
        run(second_one_ends)
    assert time.monotonic() - begin < 100
    assert run(rank_and_sum, 1.0) == [(0, 3.0), (1, 3.0)]


def test_what_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="top of a module"):
        check_sharded_transform(lambda: tx.scale(1.0))
    with pytest.raises(ArgumentError, match="even number"):
        check_sharded_transform(functools.partial(tx.scale, 1.0), processes=3)
