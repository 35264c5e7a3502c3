"""Progress in a terminal, in a notebook, and as plain lines. Each display has the same four methods, and `progress`.

- `update(count)`: so many more steps are done. It is called at each step and draws only now and then.
- `show()`: draw now; the metrics have changed.
- `log(logs)`: add logs.
- `close()`: the last state stays visible, unless the display is nested in another one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from html import escape
from typing import Any

from fts.errors import MissingDependencyError
from fts.messages import install_hint
from fts.trainer.callbacks.progress_state import ProgressState, format_metrics, format_speed

REFRESH_SECONDS = 0.25
"""Seconds between two refreshes of a terminal or a notebook."""

LINE_SECONDS = 60.0
"""Seconds without a line after which a line with the progress is printed."""

MAX_TABLE_ROWS = 200
"""How many of the newest logs a notebook shows."""

SPEED_SUFFIXES = ("_runtime", "_per_second")
"""Suffixes of logs that the table of a notebook leaves out."""

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{metrics}]"
UNSIZED_BAR_FORMAT = "{desc}: {n_fmt} [{elapsed}{metrics}]"


def open_display(progress: ProgressState, outer: Any = None) -> Any:
    """The display for a notebook, a terminal or a log file, wherever the program runs.

    Args:
        progress: the progress to show.
        outer: the display that it is nested in.
    """
    if isinstance(outer, NotebookDisplay):
        return NestedDisplay(progress, outer)
    if in_notebook():
        return NotebookDisplay(progress)
    return terminal_bar(progress, outer is not None) if in_terminal() else LineDisplay(progress)


def in_terminal() -> bool:
    """Whether the standard error is a terminal."""
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
        progress: the progress to show.
    """

    def __init__(self, progress: ProgressState) -> None:
        self.progress = progress
        self.next = time.monotonic() + LINE_SECONDS

    def update(self, count: int) -> None:
        """Count steps."""
        self.progress.step += count
        if time.monotonic() >= self.next:
            self.write()

    def show(self) -> None:
        """Do nothing: the next line has the metrics."""

    def log(self, logs: Mapping[str, Any]) -> None:
        """Write logs to the standard output, and a line."""
        print(logs, flush=True)  # noqa: T201
        self.write()

    def write(self) -> None:
        """Write a line."""
        self.next = time.monotonic() + LINE_SECONDS
        if sys.stderr is not None:
            print(self.progress.line(), file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        """Do nothing."""


def terminal_bar(progress: ProgressState, nested: bool = False) -> Any:
    """A bar of tqdm, followed by the metrics."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            f"A progress bar needs tqdm: {install_hint('trainer')}. Or print the logs instead: disable_tqdm=True."
        ) from error

    class Bar(tqdm):  # type: ignore[misc]
        """tqdm reads `format_dict` when it draws: its documented way to extend a bar."""

        @property
        def format_dict(self) -> dict[str, Any]:
            """The fields of the format."""
            fields: dict[str, Any] = super().format_dict
            done, seconds = fields["n"] - fields["initial"], fields["elapsed"]
            rate = fields["rate"] or (done / seconds if seconds else None)
            parts = [format_speed(rate, progress.examples_per_step), format_metrics(progress.metrics)]
            return fields | {"metrics": "".join(f", {part}" for part in parts if part)}

        def show(self) -> None:
            """Draw now."""
            self.refresh()

        def log(self, logs: Mapping[str, Any]) -> None:
            """Write logs above the bar, to the standard output."""
            self.write(str(logs))

    style: dict[str, Any] = {"mininterval": REFRESH_SECONDS, "dynamic_ncols": True, "leave": not nested, "desc": progress.stage}
    style["bar_format"] = UNSIZED_BAR_FORMAT if progress.total is None else BAR_FORMAT
    bar = Bar(total=progress.total, initial=progress.initial, **style)
    bar.progress = progress
    return bar


class NotebookDisplay:
    """A bar and a table of the logs, as HTML that is updated in its place.

    Args:
        progress: the progress to show.
    """

    def __init__(self, progress: ProgressState) -> None:
        from IPython.display import HTML, display

        self.html = HTML
        self.progress = progress
        self.nested: ProgressState | None = None
        self.rows: dict[Any, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.handle = display(HTML(self.text()), display_id=True)
        self.next = time.monotonic() + REFRESH_SECONDS

    def update(self, count: int) -> None:
        """Count steps."""
        self.progress.step += count
        self.draw()

    def draw(self) -> None:
        """Draw if `REFRESH_SECONDS` have passed."""
        if time.monotonic() >= self.next:
            self.show()

    def show(self) -> None:
        """Draw now."""
        self.next = time.monotonic() + REFRESH_SECONDS
        if self.handle is not None:
            self.handle.update(self.html(self.text()))

    def log(self, logs: Mapping[str, Any]) -> None:
        """Add logs to the row of their step; those of the run are shown below the table."""
        if "train_runtime" in logs:
            self.summary = dict(logs)
            return
        row = self.rows.setdefault(self.progress.step, {"step": self.progress.step})
        row.update({name: value for name, value in logs.items() if not name.endswith(SPEED_SUFFIXES)})
        while len(self.rows) > MAX_TABLE_ROWS:
            del self.rows[next(iter(self.rows))]

    def close(self) -> None:
        """Draw a last time."""
        self.show()

    def text(self) -> str:
        """The HTML."""
        summary = f"<div>{escape(format_metrics(self.summary))}</div>" if self.summary else ""
        nested = "" if self.nested is None else _bar(self.nested)
        return _bar(self.progress) + nested + html_table(list(self.rows.values())) + summary


class NestedDisplay:
    """An evaluation inside training, on the display of a notebook.

    Args:
        progress: the progress to show.
        outer: the display of training.
    """

    def __init__(self, progress: ProgressState, outer: NotebookDisplay) -> None:
        self.progress = progress
        self.outer = outer
        outer.nested = progress

    def update(self, count: int) -> None:
        """Count batches."""
        self.progress.step += count
        self.outer.draw()

    def close(self) -> None:
        """Remove it."""
        self.outer.nested = None
        self.outer.show()


def _bar(progress: ProgressState) -> str:
    style = "width: 300px; vertical-align: middle"
    bar = f'<progress value="{progress.step}" max="{progress.total}" style="{style}"></progress> ' if progress.total else ""
    return f"<div>{bar}{escape(progress.line())}</div>"


def html_table(rows: list[dict[str, Any]]) -> str:
    """Logs as an HTML table, one row each; empty without logs.

    >>> html_table([{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.25}])
    '<table><tr><th>step</th><th>loss</th><th>eval_loss</th></tr><tr><td>1</td><td>0.5</td><td></td></tr>...'
    """
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(str(name))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in names) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
