"""docs/parity.md keeps its promises: every name has a row, every row a test, and what is not yet there says so."""

import re
from pathlib import Path

import pytest

import fts
from tests.trainer.helpers import make_trainer

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "parity.md"
NAMES = TESTS / "reference_names.txt"
STATES = re.compile(r"works(: .+)?|needs .+|not yet")
TEST = re.compile(r"`([\w/]+\.py)::(\w+(?:::\w+)?)`")


def sections(text: str) -> dict[str, str]:
    """The page's text under each heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def reference() -> dict[str, list[str]]:
    """The names that need a row, by section."""
    parts = re.split(r"^\[(.+)\]$", NAMES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {group: names.split() for group, names in zip(parts[1::2], parts[2::2], strict=True)}


def rows() -> dict[tuple[str, str], tuple[str, str]]:
    """(section, name) -> (state, tests)."""
    found = {}
    for section, text in sections(PAGE.read_text(encoding="utf-8")).items():
        if section in reference():
            for name, state, tests in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, flags=re.MULTILINE):
                assert (section, name) not in found, f"two rows for {name} in {section}"
                found[section, name] = (state, tests)
    return found


ROWS = rows()
NOT_YET = sorted(key for key, (state, _) in ROWS.items() if state == "not yet")


@pytest.mark.parametrize("section", reference())
def test_every_name_has_a_row(section):
    assert [name for group, name in ROWS if group == section] == reference()[section]


@pytest.mark.parametrize("key", ROWS, ids=".".join)
def test_every_row_has_a_state_and_a_test(key):
    state, tests = ROWS[key]
    assert STATES.fullmatch(state)
    assert TEST.search(tests)
    assert TEST.sub("", tests).strip(" ,") == ""


def test_arguments_are_those_of_the_classes():
    fields = fts.TrainingArguments.__dataclass_fields__
    assert set(reference()["TrainingArguments"]) <= set(fields)
    extra = set(fts.Seq2SeqTrainingArguments.__dataclass_fields__) - set(fields)
    assert set(reference()["Seq2SeqTrainingArguments"]) <= extra


def test_methods_and_attributes_are_those_of_the_classes(tmp_path):
    trainer = make_trainer(tmp_path)
    for group, owner in (
        ("Trainer: methods", trainer),
        ("Trainer: attributes", trainer),
        ("Seq2SeqTrainer: methods", fts.Seq2SeqTrainer),
        ("TrainingArguments: methods", trainer.args),
        ("TrainingArguments: properties", trainer.args),
        ("Events", fts.TrainerCallback),
        ("TrainerControl", trainer.control),
        ("TrainerState", trainer.state),
        ("Exports", fts),
    ):
        missing = [name for name in reference()[group] if not hasattr(owner, name)]
        assert not missing, group


def test_nothing_is_missing():
    assert NOT_YET == []
