"""The layout that docs/design.md describes: no import cycles, who may import whom, and functions of a readable size."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACADE = "fts.trainer"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "fts").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(name: str) -> Iterator[tuple[str, str | None]]:
    """What a module imports of fts, also in a function or for types alone: modules, with the name taken from each."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "fts")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            module = str(node.module)
            if module.split(".", maxsplit=1)[0] == "fts":
                for alias in node.names:
                    inner = f"{module}.{alias.name}"
                    yield (inner, None) if inner in FILES else (module, alias.name)


GRAPH = {name: {module for module, _ in imported(name)} - {name} for name in FILES}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            component = stack[stack.index(node) :]
            del stack[-len(component) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def test_cycles_finds_one():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert "fts.trainer.trainer" in GRAPH["fts.trainer"]


def test_no_module_is_in_an_import_cycle():
    assert cycles(GRAPH) == []


def test_no_package_is_in_an_import_cycle():
    def package(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[: 3 if parts[:2] == ["fts", "trainer"] else 2])

    graph: dict[str, set[str]] = {}
    for name, modules in GRAPH.items():
        if name not in ("fts", FACADE):
            graph.setdefault(package(name), set()).update(set(map(package, modules)) - {package(name)})
    assert cycles(graph) == []


def test_every_imported_module_exists():
    assert [(name, module) for name, modules in GRAPH.items() for module in modules if module not in FILES] == []


def test_only_the_facade_itself_imports_the_trainer():
    users = {name for name in FILES for module, taken in imported(name) if taken == "Trainer" or module == f"{FACADE}.trainer"}
    assert users <= {"fts", FACADE, f"{FACADE}.seq2seq"}


def test_the_facade_has_only_its_two_classes_at_the_top():
    assert {path.stem for path in (ROOT / "fts/trainer").glob("*.py")} == {"__init__", "trainer", "seq2seq"}


@pytest.mark.parametrize(
    "folder", sorted(path.name for path in (ROOT / "fts/trainer").iterdir() if (path / "__init__.py").exists())
)
def test_inner_modules_of_a_subpackage_are_imported_by_itself_alone(folder):
    package = f"{FACADE}.{folder}"
    assert ast.get_docstring(TREES[package]), f"{package} does not say what it does"
    users = {
        (name, module)
        for name in FILES
        for module, _ in imported(name)
        if module.startswith(f"{package}.") and name != package and not name.startswith(f"{package}.")
    }
    assert users == set()


# Sizes

LONG = 60
MANY = 7
THEIRS = "the signature is that of transformers"
PUBLIC = "keyword arguments of a public function, each with a default and of its own meaning"
REASONS = {
    "fts.cli.plan.add_to": "one line for each option of a command",
    "fts.loops.async_checkpointer.save": PUBLIC,
    "fts.loops.fit.fit": PUBLIC,
    "fts.loops.source_factory.source": PUBLIC,
    "fts.trainer.arguments.setters.set_dataloader": THEIRS,
    "fts.trainer.arguments.setters.set_logging": THEIRS,
    "fts.trainer.arguments.setters.set_training": THEIRS,
    "fts.trainer.seq2seq.__init__": THEIRS,
    "fts.trainer.trainer.__init__": THEIRS,
    "fts.trainer.trainer.create_model_card": THEIRS,
    "fts.transforms.optimizers.optimizer": PUBLIC,
    "fts.transforms.schedules.warmup_stable_decay_schedule": PUBLIC,
}
"""Functions that are longer, or take more, each with the reason."""


def functions() -> Iterator[tuple[str, int, int]]:
    """Each function with its lines below the docstring, and its parameters without `self` or `cls`."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                arguments = node.args
                parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                count = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
                yield f"{name}.{node.name}", (node.end_lineno or 0) - body[0].lineno + 1 if body else 0, count


def test_functions_are_short_and_take_little_or_say_why():
    large = {name for name, lines, parameters in functions() if lines > LONG or parameters > MANY}
    assert large - REASONS.keys() == set()
    assert REASONS.keys() - large == set(), "these need no reason any more"


def test_the_trainer_is_readable_in_one_sitting():
    assert len(FILES[f"{FACADE}.trainer"].read_text(encoding="utf-8").splitlines()) < 700


# The picture in docs/design.md


def contracts() -> list[dict[str, object]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert settings["exclude_type_checking_imports"] is False
    found: list[dict[str, object]] = settings["contracts"]
    return found


def layers_of(container: str) -> list[set[str]]:
    """The layers of a package by the contracts, the highest first."""
    (contract,) = (one for one in contracts() if one["type"] == "layers" and one["containers"] == [container])
    return [set(re.findall(r"[\w.]+", layer)) for layer in contract["layers"]]  # type: ignore[attr-defined]


def picture_of(container: str) -> list[set[str]]:
    """The layers of a package in the picture of the design page, the highest first."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    block = page.split(f"<!-- layers of {container} -->\n", 1)[1].split("<!-- end -->", 1)[0]
    lines = [
        line.split("  ", 1)[0] for line in (line.removeprefix("    ") for line in block.splitlines()) if line and line[0] != " "
    ]
    return [{name.strip().rstrip("/").removesuffix(".py") for name in line.split(",")} for line in lines]


@pytest.mark.parametrize("container", ["fts", FACADE])
def test_the_picture_of_the_packages_is_that_of_the_contracts(container):
    assert picture_of(container) == layers_of(container)
    there = {name.split(".")[container.count(".") + 1] for name in FILES if name.startswith(f"{container}.")}
    assert set().union(*picture_of(container)) == there
