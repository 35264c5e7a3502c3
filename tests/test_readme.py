"""The code that README.md and docs/design.md show runs as it stands, in the order in which it is read."""

import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fts

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)

Block = tuple[str, str]
"""Where a block stands (`file:line`), and its code."""


def fenced_blocks(path: Path) -> list[Block]:
    text = path.read_text()
    fences = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(place(path, text, fence.start(1)), fence[1]) for fence in fences]


def indented_blocks(path: Path, heading: str) -> list[Block]:
    text = path.read_text()
    start = text.index(f"\n## {heading}\n")
    end = text.find("\n## ", start + 1)
    indented = re.compile(r"(?:^ {4}.*\n(?:^[ \t]*\n)*)+", re.MULTILINE)
    return [
        (place(path, text, match.start()), textwrap.dedent(match[0]).strip() + "\n")
        for match in indented.finditer(text, start, end if end >= 0 else len(text))
    ]


def place(path: Path, text: str, offset: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, offset) + 1}"


def given() -> dict[str, object]:
    """What the snippets take for granted: a module, a batch, data, and torch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = [{"x": torch.randn(16, 8), "y": torch.randint(3, (16,))} for _ in range(4)]
    module = ModuleType("snippets")
    sys.modules[module.__name__] = module  # torch.compile looks the globals of a function up in its module
    vars(module).update(torch=torch, net=net, data=data, batch=data[0], **facade())
    return vars(module)


def facade() -> dict[str, object]:
    """A model, arguments and examples for the snippets of the Trainer."""

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(8, 1)

        def forward(self, x, labels=None):
            guess = self.line(x).squeeze(-1)
            return {"loss": nn.functional.mse_loss(guess, labels), "logits": guess}

    examples = [{"x": torch.randn(8), "labels": 1.0} for _ in range(20)]
    args = fts.TrainingArguments(tempfile.mkdtemp(), use_cpu=True, disable_tqdm=True)
    return {"Trainer": fts.Trainer, "model": Regression(), "args": args, "examples": examples}


def run(blocks: list[Block], namespace: dict[str, object]) -> dict[str, object]:
    for where, code in blocks:
        path, line = where.rsplit(":", 1)
        # blank lines in front, so that a traceback names the line of the document
        exec(compile("\n" * (int(line) - 1) + code, path, "exec"), namespace)
    return namespace


DESIGN = indented_blocks(ROOT / "docs" / "design.md", "The code to aim at")
README = fenced_blocks(ROOT / "README.md")


def test_both_documents_show_code() -> None:
    assert len(DESIGN) == 2
    assert len(README) >= 2


def test_readme_opens_with_the_snippets_of_the_design_page() -> None:
    assert [code for _, code in README[:2]] == [code for _, code in DESIGN]


@pytest.mark.skipif(COMPILER is None, reason="the snippet calls steps.compile, and there is no C++ compiler here")
def test_snippets_run_unchanged() -> None:
    shown = {code for _, code in DESIGN}
    namespace = run(DESIGN, given())
    assert int(namespace["event"].state.step) == 1_000
    run([block for block in README if block[1] not in shown], namespace)
