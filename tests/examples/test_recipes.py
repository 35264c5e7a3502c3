"""Every recipe does what it claims, is short, uses only public names, and has a row in the table."""

import ast
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
FILES = sorted(RECIPES.glob("*.py"))
LONGEST = 45
"""Lines of code in a recipe; docstrings, imports and blank lines are not counted."""

each_recipe = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_lines(source: str) -> int:
    """The number of lines of code."""
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped.update(range(node.lineno, node.end_lineno + 1))
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
        if documented:
            skipped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and number not in skipped for number, line in enumerate(source.splitlines(), 1))


def private_names(source: str) -> list[str]:
    """Names with a leading underscore, and inner modules of the packages of fts."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found.append(node.attr)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fts."):
            found.append(node.module)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [alias.name for alias in node.names if alias.name.startswith(("_", "fts."))]
    return found


@each_recipe
def test_recipe_does_what_it_claims(path: Path) -> None:
    metrics = load(path).main()
    assert metrics
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values()), metrics


@each_recipe
def test_recipe_is_short(path: Path) -> None:
    assert code_lines(path.read_text()) <= LONGEST


@each_recipe
def test_recipe_uses_public_names_alone(path: Path) -> None:
    assert private_names(path.read_text()) == []


@each_recipe
def test_recipe_says_what_it_is(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    assert "https://" in text or "Paper: " in text
    assert "\nShows: " in text


@each_recipe
def test_recipe_has_its_row_in_the_table(path: Path) -> None:
    rows = [line for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert sum(row.startswith(f"| [{path.name}]({path.name}) |") for row in rows) == 1
    assert len(rows) == len(FILES)


def test_lines_are_counted_without_imports_docstrings_and_blanks() -> None:
    imports = "import torch\nfrom torch import (\n    nn,\n)\n"
    function = 'def f():\n    """Doc."""\n\n    # why\n    return 1\n'
    assert code_lines(f'"""Two\nlines."""\n\n{imports}\n\n{function}') == 3
