from datetime import timedelta

import pytest

from fts.errors import ArgumentError
from fts.loops.durations import parse_duration


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (90, 90.0), (0, 0.0), (1.5, 1.5), ("90s", 90.0), ("2h30m", 9000.0), ("2h 30m", 9000.0), ("1.5h", 5400.0),
        ("1d", 86400.0), ("20min", 1200.0), ("90 sec", 90.0), ("1 hour", 3600.0), ("2 Hours 30 minutes", 9000.0),
        ("1day 1hr 1mins 1secs", 90061.0), ("2 hrs", 7200.0), ("0.5 days", 43200.0), ("10 m 5 seconds", 605.0),
        ("02:30:00", 9000.0), ("1-00:00:01", 86401.0), ("1:00:00:01", 86401.0), (timedelta(minutes=2), 120.0),
    ],
)  # fmt: skip
def test_lengths_of_time(given, seconds):
    assert parse_duration(given) == seconds


@pytest.mark.parametrize(
    "given", ["", "2", "2:30", "3x", "h", "5 mi", "20ms", "1 month", "min", "1h 5", -1, float("nan"), True, None, "-5s"]
)
def test_other_durations_are_errors(given):
    with pytest.raises(ArgumentError, match="is not a duration"):
        parse_duration(given)
