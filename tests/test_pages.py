"""Everything that a page names exists: tests, files, functions, and the parameters on the page of signatures."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fts

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHER_PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
TEST = re.compile(r"`([\w/]+\.py)::(\w+)(?:::(\w+))?`")
CODE = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?<![\w./])(?:fts|tests|docs|examples|benchmarks)/[\w./-]*")
DOTTED = re.compile(r"(?<![\w./])(fts|steps|loops|tx|distributed|storage)((?:\.[A-Za-z_]\w*)+)")
ROOTS = {"fts": "fts", "tx": "fts.transforms", **{name: f"fts.{name}" for name in ("steps", "loops", "distributed", "storage")}}


def code_in(page):
    """The text between backticks on each page, except in blocks."""
    return CODE.findall(FENCED.sub("", page.read_text(encoding="utf-8")))


def resolve(dotted):
    """The module or object of a dotted name."""
    first, *names = dotted.split(".")
    found, path = importlib.import_module(ROOTS[first]), ROOTS[first]
    for name in names:
        path += f".{name}"
        if not hasattr(found, name):
            importlib.import_module(path)
        found = getattr(found, name)
    return found


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
    assert len(TEST.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))) > least


@pytest.mark.parametrize("page", PAGES + OTHER_PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_and_object_that_is_named_exists(page):
    for code in code_in(page):
        for file in FILE.findall(code):
            assert (ROOT / file).exists(), f"{page.name} names {file}"
        for first, names in DOTTED.findall(code):
            try:
                resolve(first + names)
            except (ImportError, AttributeError) as error:
                pytest.fail(f"{page.name} names {first}{names}: {error}")


def test_the_check_finds_what_is_missing():
    assert resolve("tx.adamw") is fts.transforms.adamw
    assert resolve("fts.loops.checkpoint_list.list_checkpoints").__module__ == "fts.loops.checkpoint_list"
    with pytest.raises(ImportError):
        resolve("steps.no_such_step")


def listed_signatures():
    """`(module, name, parameters)` for each call in the lists of docs/signatures.md, with the class in a method's name."""
    text = (ROOT / "docs" / "signatures.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", re.sub(r",\n {34}", ", ", text), flags=re.MULTILINE)[1:]:
        folder = (CODE.findall(section.splitlines()[0]) or ["fts/"])[0]
        for block in section.split("\n\n"):
            module = owner = ""
            for line in block.splitlines():
                row = re.match(r"    ([\w/]+)(?:\.py|/) +(?=\S)", line)
                if row:
                    module = f"{'fts/steps/' if row[1] == 'collectives' else folder}{row[1]}".replace("/", ".")
                code = line[row.end() if row else 0 :].split("  #")[0]
                for call in re.finditer(r"(?:^|(?<=\s))(\.?[A-Za-z][\w.]*)(\(?)", code if module else ""):
                    name = call[1]
                    if name[0].isupper() and (call[2] or "." in name):
                        owner = name.split(".")[0]
                    if call[2]:
                        yield module, owner + name if name[0] == "." else name, in_parentheses(code[call.end() :])


def in_parentheses(text):
    """The text up to the parenthesis that closes one before it."""
    depth = 1
    for end, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:end]
    raise ValueError(text)


def test_listed_parameters_are_those_of_the_functions():
    checked, wrong = 0, []
    for module, name, listed in listed_signatures():
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if "..." not in listed:
            args = ast.parse(f"lambda {listed}: 0", mode="eval").body.args
            named = {arg.arg for arg in (*args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg}
            expected = {each for each in inspect.signature(found).parameters if each != "self"}
            checked += 1
            if named != expected:
                wrong.append(f"{module}.{name}({listed}) has the parameters {', '.join(sorted(expected))}")
    assert wrong == []
    assert checked > 250
