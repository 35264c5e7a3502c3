"""How much the loggers of fts tell."""

from __future__ import annotations

import logging
import sys
from typing import Any

from fts.errors import ArgumentError

LOG_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
"""The values of `log_level`, beside "passive"."""


class StderrHandler(logging.Handler):
    """Writes to the standard error stream of the moment, but is silent where the root logger has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not logging.getLogger().handlers:
            sys.stderr.write(self.format(record) + "\n")


def apply_log_level(args: Any) -> None:
    """Set the level of the "fts" logger from `log_level`, or from `log_level_replica` in a process that does not log.

    Where nothing handles its records yet, they go to standard error, as they would under Python's default, but from the chosen
    level on. The root logger and those of other libraries stay as they are.

    Args:
        args: have `log_level` and `log_level_replica` ("debug", "info", "warning", "error", "critical", or "passive", which
            leaves everything as it is) and `should_log`.

    Raises:
        ArgumentError: the level is unknown.

    >>> from types import SimpleNamespace
    >>> apply_log_level(SimpleNamespace(log_level="passive", log_level_replica="warning", should_log=True))
    """
    name = "log_level" if args.should_log else "log_level_replica"
    level = getattr(args, name)
    if level == "passive":
        return
    if level not in LOG_LEVELS:
        raise ArgumentError(f"{name}={level!r} is unknown. Use one of {', '.join(map(repr, LOG_LEVELS))} or 'passive'.")
    ours = logging.getLogger("fts")
    ours.setLevel(LOG_LEVELS[level])
    if not ours.hasHandlers():
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(name)s:%(lineno)d] %(asctime)s >> %(message)s"))
        ours.addHandler(handler)
