"""CodeCarbon, where it is installed."""

import pytest

from fts.trainer.trackers import TrackerCallback
from tests.trainer.helpers import make_trainer

SHORT = {"max_steps": 4, "logging_steps": 2}


def test_codecarbon_measures_only_training(tmp_path):
    pytest.importorskip("codecarbon")
    trainer = make_trainer(tmp_path, **SHORT, run_name="mine", callbacks=[TrackerCallback(["codecarbon"])])
    trainer.train()
    trainer.evaluate()
    head, *runs = (tmp_path / "emissions.csv").read_text().splitlines()
    assert [row.split(",")[head.split(",").index("project_name")] for row in runs] == ["mine"]
