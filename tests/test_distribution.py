"""pip's name of this project is its own: PyPI's `fts` is another project with the same import name and command."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fts.messages import DISTRIBUTION, install_hint

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path
    for part in ("fts", "docs", "examples", "benchmarks", "README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")
    for path in ([ROOT / part] if (ROOT / part).is_file() else sorted((ROOT / part).rglob("*")))
    if path.suffix in (".py", ".md", "") and path.is_file()
]


def test_the_project_has_the_name_that_messages_give():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION != "fts"
    for extra in ("trainer", "search", "dev"):
        assert extra in project["optional-dependencies"]
        assert install_hint(extra) == f"pip install '{DISTRIBUTION}[{extra}]'"


def test_no_message_or_page_installs_the_other_project():
    wrong = re.compile(r"pip\s+install\s[^`\n]*(?<![\w./-])fts(?![\w./-])")
    found = [(path.name, line) for path in PAGES for line in path.read_text(encoding="utf-8").splitlines() if wrong.search(line)]
    assert found == []
    assert wrong.search("pip install fts") and wrong.search("pip install -U 'fts[trainer]'")
    assert not wrong.search(f"pip install {DISTRIBUTION}") and not wrong.search("pip install -e .")


@pytest.mark.parametrize("known", [True, False])
def test_files_of_another_project_over_ours_are_an_error(tmp_path, known):
    (tmp_path / "fts").mkdir()
    for path in (ROOT / "fts").iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (tmp_path / "fts" / path.name).symlink_to(path)
    (tmp_path / "fts" / "__init__.py").write_text('__version__ = "1.1.0"')
    if known:
        (tmp_path / "fts-1.1.0.dist-info").mkdir()
        (tmp_path / "fts-1.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.0\nName: fts\nVersion: 1.1.0\n")
    code = """
import importlib, sys
from importlib import metadata
def version(name, find=metadata.version):
    if name == "fts" and not KNOWN:
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.version = version
for use in (lambda: importlib.import_module("fts.trainer"), lambda: importlib.import_module("fts.cli").main([])):
    try:
        use()
    except ImportError as error:
        print(error)
""".replace("KNOWN", str(known))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    for line in lines:
        assert f"is not that of {DISTRIBUTION}. " in line
        assert line.endswith(f"pip uninstall fts, then pip install --force-reinstall --no-deps {DISTRIBUTION}.")
        assert ("The distribution 'fts' 1.1.0, another project, is installed" in line) == known
