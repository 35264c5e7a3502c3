"""Every test that a page names exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGES = sorted((TESTS.parent / "docs").glob("*.md"))
TEST = re.compile(r"`([\w/]+\.py)::(\w+)(?:::(\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_test_that_is_named_exists(page):
    for file, name, method in TEST.findall(page.read_text(encoding="utf-8")):
        path = TESTS / file
        assert path.is_file(), f"{page.name} names {file}"
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found = next((node for node in body if getattr(node, "name", None) == name), None)
        assert found is not None, f"{page.name} names {file}::{name}"
        assert not method or method in {getattr(node, "name", None) for node in found.body}, f"{file}::{name}::{method}"


@pytest.mark.parametrize(("page", "least"), [("reliability", 40), ("parity", 100)])
def test_the_pages_of_promises_name_tests(page, least):
    assert len(TEST.findall((TESTS.parent / "docs" / f"{page}.md").read_text(encoding="utf-8"))) > least
