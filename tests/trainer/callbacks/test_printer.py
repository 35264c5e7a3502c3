import pytest

from fts.trainer import PrinterCallback, TrainerState
from tests.trainer.helpers import make_trainer

LOGS = {"loss": 0.123456, "learning_rate": 1e-05, "step": 3, "name": "x" * 200, "total_flos": 12.0}


def test_printing_instead_of_bars(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2, logging_steps=1).train()
    shown = capsys.readouterr()
    assert "'learning_rate'" in shown.out
    assert "%" not in shown.err


def test_lines_are_those_of_transformers(capsys):
    theirs = pytest.importorskip("transformers").PrinterCallback
    printed = []
    for kind in (PrinterCallback, theirs):
        kind().on_log(None, TrainerState(), None, logs=dict(LOGS))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_only_the_main_process_prints_and_logs_stay(capsys):
    logs = dict(LOGS)
    PrinterCallback().on_log(None, TrainerState(is_local_process_zero=False), None, logs=logs)
    assert not capsys.readouterr().out
    PrinterCallback().on_log(None, TrainerState(), None, logs=logs)
    assert logs == LOGS
