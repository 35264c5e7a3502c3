"""Azure ML, by a fake of its documented calls."""

from fts.trainer.trackers import TrackerCallback
from tests.trainer.helpers import make_trainer
from tests.trainer.trackers.fake_modules import fake_module

SHORT = {"max_steps": 4, "logging_steps": 2}


def test_azure_ml_gets_the_metrics_of_its_run(tmp_path, monkeypatch):
    sent, properties = [], {}

    class Run:
        @classmethod
        def get_context(cls):
            return cls()

        def log(self, name, value, description="", step=None):
            sent.append((step, name, value))

        def add_properties(self, values):
            properties.update(values)

    fake_module(monkeypatch, "azureml.core.run", Run=Run)
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback(["azure_ml"])])
    trainer.train()
    losses = [(entry["step"], "loss", entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert [one for one in sent if one[1] == "loss"] == losses
    assert properties["plan/total_steps"] == "4"
