"""Values of JSON are used only if they have the expected types."""

import attrs
import pytest
from attrs.validators import ge

from fts.errors import CheckpointError
from fts.storage import check_type, structure


@attrs.frozen
class Record:
    row: int = attrs.field(validator=ge(0))
    name: str | None = None


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (2**63 - 1, int),
        (None, str | None),
        ([1, None], list[int | None]),
        ({"a": {"b": 0.5}}, dict[str, dict[str, float]]),
    ],
)
def test_a_matching_value_is_returned(value, hint):
    assert check_type(value, hint, "a.json") is value


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "True must be int"),
        (0.5, int, "0.5 must be int"),
        (2**63, int, "a number of 64 bits must be int"),
        ([10**5000], dict, "a list must be dict"),
        ("1", float, "'1' must be float"),
        ({"a": [1]}, dict[str, float], r"\{'a': \[1\]\} must be dict\[str, float\]"),
    ],
)
def test_a_mismatch_is_an_error(value, hint, message):
    with pytest.raises(CheckpointError, match=f"a.json is corrupt: {message}"):
        check_type(value, hint, "a.json")


def test_a_record_needs_the_fields_of_its_class():
    assert structure(Record, {"row": 1}, "a.json") == Record(1)
    for values, message in (
        ([1], "a.json is corrupt"),
        ({"row": "1"}, "row of a.json is corrupt: '1' must be int"),
        ({"row": 1, "column": 2}, "column"),
        ({}, "row"),
        ({"row": -1}, "'row' must be >= 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            structure(Record, values, "a.json")
