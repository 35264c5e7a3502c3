"""A plan's arithmetic on arguments."""

from fts.trainer.arguments.plan import resolve_steps


def test_shares_of_all_steps():
    assert [resolve_steps(value, 30) for value in (0, 0.1, 0.33, 1, 5)] == [0, 3, 10, 1, 5]
