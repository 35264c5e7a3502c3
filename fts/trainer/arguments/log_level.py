"""The names of log levels, and the level of this process."""

from __future__ import annotations

import logging

LOG_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
"""The values of `log_level`, besides "passive", which changes nothing."""


def process_log_level(log_level: str, log_level_replica: str, should_log: bool) -> int:
    """The log level of this process, as a number of `logging`.

    >>> process_log_level("info", "warning", should_log=False) == logging.WARNING
    True
    """
    name = log_level if should_log else log_level_replica
    return LOG_LEVELS[name] if name in LOG_LEVELS else logging.getLogger("fts").getEffectiveLevel()
