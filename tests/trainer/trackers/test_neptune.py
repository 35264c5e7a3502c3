"""Neptune, by a fake of its documented calls."""

from fts.trainer.trackers import TrackerCallback
from tests.trainer.helpers import make_trainer
from tests.trainer.trackers.fake_modules import fake_module

SHORT = {"max_steps": 4, "logging_steps": 2}


def test_neptune_gets_config_and_series(tmp_path, monkeypatch):
    series, fields, opened = {}, {}, []

    class Field:
        def __init__(self, name):
            self.name = name

        def append(self, value, step):
            series.setdefault(self.name, []).append((step, value))

        def fetch(self):
            return "FTS-1"

    class Run:
        def __init__(self, **given):
            opened.append(given)

        def __getitem__(self, name):
            return Field(name)

        def __setitem__(self, name, value):
            fields[name] = value

        def stop(self):
            opened.append("stopped")

    fake_module(monkeypatch, "neptune", init_run=Run)
    monkeypatch.setenv("NEPTUNE_PROJECT", "me/tests")
    callback = TrackerCallback(["neptune"])
    make_trainer(tmp_path, **SHORT, run_name="mine", callbacks=[callback]).train()
    assert opened == [{"name": "mine", "project": "me/tests"}, "stopped"]
    assert [step for step, _ in series["finetuning/train/loss"]] == [2, 4]
    assert fields["finetuning/parameters/plan/total_steps"] == 4
    assert callback.runs == {"neptune": "FTS-1"}
