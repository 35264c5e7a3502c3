"""The level of fts' loggers, and their handler."""

from __future__ import annotations

import logging
import sys
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import LOG_LEVELS


class StderrHandler(logging.Handler):
    """Writes to the current standard error stream, unless the root logger has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not logging.getLogger().handlers:
            sys.stderr.write(self.format(record) + "\n")


def apply_log_level(args: Any) -> None:
    """Set the level of the "fts" logger from `log_level`, or from `log_level_replica` in a process that does not log.

    If nothing handles its records yet, they go to standard error, as by Python's default, but from this level on. The root logger
    and those of other libraries stay unchanged.

    Args:
        args: have `log_level` and `log_level_replica` ("debug", "info", "warning", "error", "critical", or "passive", which
            changes nothing) and `should_log`.

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
    logger = logging.getLogger("fts")
    logger.setLevel(LOG_LEVELS[level])
    if not logger.hasHandlers():
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(name)s:%(lineno)d] %(asctime)s >> %(message)s"))
        logger.addHandler(handler)
