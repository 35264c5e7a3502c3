"""The progress display in a real terminal, in an executed notebook, and in several lines of a log."""

import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fts.trainer import ProgressCallback, TrainerState
from fts.trainer.callbacks import close_bars
from fts.trainer.callbacks.displays import MAX_TABLE_ROWS, html_table
from tests.trainer.helpers import arguments

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("run_with_progress.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def in_a_terminal(columns: int, *arguments: str) -> str:
    """What a program writes to a terminal that is so wide."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments], stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT, close_fds=True
    ) as program:
        os.close(slave)
        written = b""
        try:
            while part := os.read(master, 65536):
                written += part
        except OSError:  # how Linux reports that no process has the terminal open
            pass
        os.close(master)
    assert program.returncode == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("columns", [160, 60])
def test_a_terminal_has_one_live_line(tmp_path, columns):
    written = in_a_terminal(columns, str(tmp_path))
    pictures = [line for line in re.split(r"[\r\n]+", written) if line.startswith("train:")]
    assert max(map(len, pictures)) <= columns
    steps = [int(re.search(r"(\d+)/(?:40|60)", line)[1]) for line in pictures]
    first, second = steps[: steps.index(40) + 1], [step for step, line in zip(steps, pictures, strict=True) if "/60" in line]
    assert first == sorted(first) and first[0] == 0
    assert second == sorted(second) and second[0] == 40 and second[-1] == 60  # it counts on
    assert any("evaluate:" in line for line in written.split("\r"))
    assert sum("'loss'" in line for line in written.split("\n")) == 6
    if columns == 160:
        last = [line for line in pictures if "40/40" in line][-1]
        assert re.search(r"examples/s, loss \S+, lr \S+, grad_norm \S+, (eval_loss|saved)", last)
        assert "saved at 40" in last and "eval_loss" in last and "at 40" in last
        assert not any("eval_loss" in line for line in pictures if "/60" in line and "40/60" in line)


def test_a_notebook_has_a_table(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = f"from tests.trainer.callbacks.run_with_progress import main\nmain({str(tmp_path)!r})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute(env=ENVIRONMENT)
    outputs = notebook.cells[0].outputs
    first, second = (output["data"]["text/html"] for output in outputs if output.output_type == "display_data")
    printed = "".join(output.get("text", "") for output in outputs)
    assert "'loss'" not in printed and "train:" not in printed
    assert '<progress value="40" max="40"' in first and '<progress value="60" max="60"' in second
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", first)]
    assert rows[0] == ["step", "loss", "grad_norm", "learning_rate", "epoch", "eval_loss"]
    assert [row[0] for row in rows[1:]] == ["10", "15", "20", "30", "40"]
    assert rows[2][1] == "" and float(rows[2][5]) > 0 and float(rows[5][1]) > 0 and float(rows[5][5]) > 0
    assert "saved at 40" in first and "train_loss" in first
    assert "evaluate" not in first  # it was there while it ran
    assert re.findall(r"<tr><td>(\d+)</td>", second) == ["45", "50", "60"]


class Handle:
    """The part of a notebook that a display writes to."""

    def __init__(self):
        self.written = []

    def update(self, html):
        self.written.append(html)


@pytest.fixture
def notebook(monkeypatch):
    """As in a kernel."""
    display = pytest.importorskip("IPython.display")
    handle = Handle()
    monkeypatch.setattr(display, "display", lambda html, display_id: (handle.update(html), handle)[1])
    monkeypatch.setattr("fts.trainer.callbacks.displays.in_notebook", lambda: True)
    return handle


def test_an_evaluation_is_shown_below_while_it_runs(notebook, monkeypatch):
    now = time.monotonic()
    state = TrainerState(max_steps=10)
    shown = ProgressCallback()
    shown.on_train_begin(None, state, None)
    monkeypatch.setattr(time, "monotonic", lambda: now + 5)
    shown.on_prediction_step(None, state, None, eval_dataloader=[1, 2, 3])
    assert "evaluate 1/3" in notebook.written[-1].data
    shown.on_evaluate(None, state, None, metrics={})
    assert "evaluate" not in notebook.written[-1].data and "train 0/10" in notebook.written[-1].data


def test_a_notebook_is_not_drawn_at_each_step(notebook):
    state = TrainerState(max_steps=10_000)
    shown = ProgressCallback()
    shown.on_train_begin(None, state, None)
    start = time.monotonic()
    for step in range(1, 10_001):
        state.global_step = step
        shown.on_step_end(None, state, None)
    assert len(notebook.written) <= 2 + (time.monotonic() - start) / 0.25


def test_a_table_of_many_logs_has_the_newest(notebook):
    state = TrainerState(max_steps=1000)
    shown = ProgressCallback()
    shown.on_train_begin(None, state, None)
    for step in range(1, MAX_TABLE_ROWS + 51):
        state.global_step = step
        shown.on_step_end(None, state, None)
        shown.on_log(None, state, None, logs={"loss": 1.0})
    text = shown.training_bar.text()
    assert re.findall(r"<tr><td>(\d+)</td>", text) == [str(step) for step in range(51, MAX_TABLE_ROWS + 51)]


def test_texts_do_not_become_markup():
    assert "&lt;b&gt;" in html_table([{"note": "<b>"}])


@pytest.mark.parametrize("where", ["lines", "terminal"])
def test_steps_are_counted_and_not_drawn(where, monkeypatch, capsys):
    monkeypatch.setattr("fts.trainer.callbacks.displays.in_terminal", lambda: where == "terminal")
    state = TrainerState(max_steps=10_000, train_batch_size=4)
    shown = ProgressCallback()
    shown.on_train_begin(arguments("unused"), state, None)
    start = time.monotonic()
    for step in range(1, 10_001):
        state.global_step = step
        shown.on_step_end(None, state, None)
    seconds = time.monotonic() - start
    written = capsys.readouterr().err
    assert written.count("\r") + written.count("\n") <= 3 + seconds / 0.25
    close_bars([shown])
