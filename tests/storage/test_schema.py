"""Values of JSON are used only where they are of the types that are needed."""

import attrs
import pytest
from attrs.validators import ge

from fts.errors import CheckpointError
from fts.storage import check_type, structure


@attrs.frozen
class Place:
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
def test_what_fits_comes_back(value, hint):
    assert check_type(value, hint, "a.json") is value


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        (True, int, "True must be int"),
        (0.5, int, "0.5 must be int"),
        (2**63, int, "a number of 64 bits must be int"),
        ([10**5000], dict, "a list must be dict"),
        ("1", float, "'1' must be float"),
        ({"a": [1]}, dict[str, float], r"\{'a': \[1\]\} must be dict\[str, float\]"),
    ],
)
def test_what_does_not_fit_is_named(value, hint, said):
    with pytest.raises(CheckpointError, match=f"a.json is damaged: {said}"):
        check_type(value, hint, "a.json")


def test_a_record_has_what_its_class_needs():
    assert structure(Place, {"row": 1}, "a.json") == Place(1)
    for values, said in (
        ([1], "a.json is damaged"),
        ({"row": "1"}, "row of a.json is damaged: '1' must be int"),
        ({"row": 1, "column": 2}, "column"),
        ({}, "row"),
        ({"row": -1}, "'row' must be >= 0"),
    ):
        with pytest.raises(CheckpointError, match=said):
            structure(Place, values, "a.json")
