"""Which checkpoints stay, as a pure function, and on the disk."""

from hypothesis import given, strategies as st

from fts.loops import rotate_checkpoints
from fts.loops.rotation import outdated


@given(
    st.lists(st.integers(1, 99), unique=True, max_size=12),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(1, 99),
)
def test_outdated_checkpoints(steps, limit, best):
    gone = outdated(steps, limit, best)
    kept = [step for step in steps if step not in gone]
    assert set(gone) <= set(steps)
    assert best not in gone
    if steps:
        assert max(steps) in kept
    if limit is None:
        assert not gone
    else:
        pinned = len({best, *sorted(steps)[-1:]} & set(steps))
        assert len(kept) == min(len(steps), max(limit, pinned))
    assert all(step > max(gone) for step in kept if gone and step not in (best, max(steps)))


def test_rotation_deletes_the_oldest_and_keeps_the_best(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    rotate_checkpoints(tmp_path, 2, best=tmp_path / "checkpoint-5")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-100", "checkpoint-final"}
