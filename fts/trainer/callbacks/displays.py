"""Progress in a terminal, in a notebook, and as plain lines. Each display has the same four methods, and `shown`.

- `update(count)`: so many more steps are done. It runs at each step and draws only now and then.
- `show()`: draw now; the figures have changed.
- `log(logs)`: add logs.
- `close()`: the last picture stays, unless the display stands inside another one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from html import escape
from typing import Any

from fts.errors import MissingDependencyError
from fts.messages import install_hint
from fts.trainer.callbacks.progress_state import (ProgressState, format_metrics, format_speed)

REFRESH_SECONDS = 0.25
"""Seconds between two pictures of a terminal or a notebook."""

LINE_SECONDS = 60.0
"""Seconds without a line after which plain lines say how far it is."""

MAX_TABLE_ROWS = 200
"""The newest logs that a notebook shows."""

SPEED_SUFFIXES = ("_runtime", "_per_second")
"""Ends of the names of logs that the table of a notebook leaves out."""

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{behind}]"
UNSIZED_BAR_FORMAT = "{desc}: {n_fmt} [{elapsed}{behind}]"


def open_display(shown: ProgressState, outer: Any = None) -> Any:
    """The display that fits where the program runs.

    Args:
        shown: what to show.
        outer: the display that it stands inside of.
    """
    if isinstance(outer, NotebookDisplay):
        return NestedDisplay(shown, outer)
    if in_notebook():
        return NotebookDisplay(shown)
    return terminal_bar(shown, outer is not None) if in_terminal() else LineDisplay(shown)


def in_terminal() -> bool:
    """Whether people see the standard error at once, and what is written over it."""
    return sys.stderr is not None and sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook.

    >>> in_notebook()
    False
    """
    package = sys.modules.get("IPython")
    shell = None if package is None else package.get_ipython()
    return hasattr(shell, "kernel")


class LineDisplay:
    """Plain lines on the standard error, for log files: with each log, and one a minute where there are none.

    Args:
        shown: what to show.
    """

    def __init__(self, shown: ProgressState) -> None:
        self.shown = shown
        self.next = time.monotonic() + LINE_SECONDS

    def update(self, count: int) -> None:
        """So many more steps are done."""
        self.shown.step += count
        if time.monotonic() >= self.next:
            self.write()

    def show(self) -> None:
        """The next line has it."""

    def log(self, logs: Mapping[str, Any]) -> None:
        """Write logs on the standard output, and a line."""
        print(logs, flush=True)  # noqa: T201
        self.write()

    def write(self) -> None:
        """Write a line."""
        self.next = time.monotonic() + LINE_SECONDS
        if sys.stderr is not None:
            print(self.shown.line(), file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        """There is nothing to close."""


def terminal_bar(shown: ProgressState, inner: bool = False) -> Any:
    """A bar of tqdm's with the figures behind it."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            f"A progress bar needs tqdm: {install_hint('trainer')}. Or print the logs instead: disable_tqdm=True."
        ) from error

    class Bar(tqdm):  # type: ignore[misc]
        """tqdm draws, and calls `format_dict` when it does: the way it documents to add to a bar."""

        @property
        def format_dict(self) -> dict[str, Any]:
            """What the format may use."""
            found: dict[str, Any] = super().format_dict
            done, seconds = found["n"] - found["initial"], found["elapsed"]
            rate = found["rate"] or (done / seconds if seconds else None)
            parts = [format_speed(rate, shown.rows), format_metrics(shown.figures)]
            return found | {"behind": "".join(f", {part}" for part in parts if part)}

        def show(self) -> None:
            """Draw now."""
            self.refresh()

        def log(self, logs: Mapping[str, Any]) -> None:
            """Write logs above the bar, on the standard output."""
            self.write(str(logs))

    style: dict[str, Any] = {"mininterval": REFRESH_SECONDS, "dynamic_ncols": True, "leave": not inner, "desc": shown.what}
    style["bar_format"] = UNSIZED_BAR_FORMAT if shown.total is None else BAR_FORMAT
    bar = Bar(total=shown.total, initial=shown.first, **style)
    bar.shown = shown
    return bar


class NotebookDisplay:
    """A bar and a table of the logs, as HTML that is updated in its place.

    Args:
        shown: what to show.
    """

    def __init__(self, shown: ProgressState) -> None:
        from IPython.display import HTML, display

        self.html = HTML
        self.shown = shown
        self.below: ProgressState | None = None
        self.rows: dict[Any, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.handle = display(HTML(self.text()), display_id=True)
        self.next = time.monotonic() + REFRESH_SECONDS

    def update(self, count: int) -> None:
        """So many more steps are done."""
        self.shown.step += count
        self.draw()

    def draw(self) -> None:
        """Draw if it is time."""
        if time.monotonic() >= self.next:
            self.show()

    def show(self) -> None:
        """Draw now."""
        self.next = time.monotonic() + REFRESH_SECONDS
        if self.handle is not None:
            self.handle.update(self.html(self.text()))

    def log(self, logs: Mapping[str, Any]) -> None:
        """Add logs: to the row of their step, or, those of the whole run, below the table."""
        if "train_runtime" in logs:
            self.summary = dict(logs)
            return
        row = self.rows.setdefault(self.shown.step, {"step": self.shown.step})
        row.update({name: value for name, value in logs.items() if not name.endswith(SPEED_SUFFIXES)})
        while len(self.rows) > MAX_TABLE_ROWS:
            del self.rows[next(iter(self.rows))]

    def close(self) -> None:
        """Draw the last time."""
        self.show()

    def text(self) -> str:
        """The HTML."""
        summary = f"<div>{escape(format_metrics(self.summary))}</div>" if self.summary else ""
        below = "" if self.below is None else _bar(self.below)
        return _bar(self.shown) + below + html_table(list(self.rows.values())) + summary


class NestedDisplay:
    """An evaluation inside training, on the display of a notebook.

    Args:
        shown: what to show.
        outer: the display of training.
    """

    def __init__(self, shown: ProgressState, outer: NotebookDisplay) -> None:
        self.shown = shown
        self.outer = outer
        outer.below = shown

    def update(self, count: int) -> None:
        """So many more batches are done."""
        self.shown.step += count
        self.outer.draw()

    def close(self) -> None:
        """Take it away."""
        self.outer.below = None
        self.outer.show()


def _bar(shown: ProgressState) -> str:
    style = "width: 300px; vertical-align: middle"
    bar = f'<progress value="{shown.step}" max="{shown.total}" style="{style}"></progress> ' if shown.total else ""
    return f"<div>{bar}{escape(shown.line())}</div>"


def html_table(rows: list[dict[str, Any]]) -> str:
    """Logs as an HTML table, one row each; nothing where there are none.

    >>> html_table([{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.25}])
    '<table><tr><th>step</th><th>loss</th><th>eval_loss</th></tr><tr><td>1</td><td>0.5</td><td></td></tr>...'
    """
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(str(name))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in names) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
