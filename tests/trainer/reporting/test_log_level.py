import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from fts.errors import ArgumentError
from fts.trainer.reporting.log_level import StderrHandler, apply_log_level


@pytest.fixture(autouse=True)
def unchanged():
    ours = logging.getLogger("fts")
    level, handlers = ours.level, list(ours.handlers)
    ours.handlers, ours.level = [], logging.NOTSET
    yield
    ours.handlers = handlers
    ours.setLevel(level)


@contextmanager
def bare_root():
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # pytest has its own there while a test runs
    try:
        yield root
    finally:
        root.handlers = handlers


def arguments(level, replica="warning", main=True):
    return SimpleNamespace(log_level=level, log_level_replica=replica, should_log=main)


def log_all():
    logger = logging.getLogger("fts.trainer.run.preparation")
    logger.debug("quiet words")
    logger.info("plain words")
    logger.warning("loud words")


def test_a_level_is_set_and_seen(capsys):
    with bare_root() as root:
        level = root.level
        apply_log_level(arguments("info"))
        apply_log_level(arguments("info"))
        log_all()
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" >> ")[1] for line in lines] == ["plain words", "loud words"]
        assert lines[0].startswith("[INFO|fts.trainer.run.preparation:")
        assert root.level == level and not root.handlers
        apply_log_level(arguments("error"))
        log_all()
        assert not capsys.readouterr().err


def test_passive_changes_nothing():
    with bare_root():
        logging.getLogger("fts").setLevel(logging.CRITICAL)
        apply_log_level(arguments("passive"))
        assert logging.getLogger("fts").level == logging.CRITICAL
        assert not logging.getLogger("fts").handlers


def test_other_processes_have_a_level_of_their_own():
    apply_log_level(arguments("debug", "error", main=False))
    assert logging.getLogger("fts").level == logging.ERROR
    apply_log_level(arguments("debug", "error"))
    assert logging.getLogger("fts").level == logging.DEBUG


def test_records_are_not_shown_twice(capsys):
    seen, own = [], logging.Handler()
    own.emit = seen.append
    with bare_root() as root:
        apply_log_level(arguments("info"))
        root.addHandler(own)  # set up after ours
        log_all()
        assert [record.getMessage() for record in seen] == ["plain words", "loud words"]
        assert not capsys.readouterr().err
        logging.getLogger("fts").handlers.clear()
        apply_log_level(arguments("info"))  # set up before ours
        assert not any(isinstance(handler, StderrHandler) for handler in logging.getLogger("fts").handlers)


def test_unknown_levels_are_named():
    with pytest.raises(ArgumentError, match=r"log_level='loud' is unknown. Use one of 'detail', 'debug', .*'passive'"):
        apply_log_level(arguments("loud"))
