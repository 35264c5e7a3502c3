"""The trackers that accelerate does not drive.

Azure ML, DagsHub and Flyte need a service around them: here are their modules' documented calls, as fakes. Kubeflow's is a
local HTTPS server. CodeCarbon and Neptune run for real where they are installed.
"""

import http.server
import json
import shutil
import ssl
import subprocess
import sys
import threading
import types

import accelerate.tracking  # noqa: F401 - looks for packages when it is imported: before the fakes are there
import pytest

from fts.errors import ArgumentError
from fts.trainer import TrainerState, TrainingArguments
from fts.trainer.trackers import FlyteCallback, TrackerCallback
from tests.trainer.helpers import arguments, make_trainer

SHORT = {"max_steps": 4, "logging_steps": 2}


def module(monkeypatch, name, **contents):
    """A module of that name, with its packages."""
    parent = ""
    for part in name.split("."):
        path = f"{parent}{part}"
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        parent = f"{path}."
    vars(sys.modules[name]).update(contents)


def test_azure_ml_gets_the_figures_of_its_run(tmp_path, monkeypatch):
    sent, properties = [], {}

    class Run:
        @classmethod
        def get_context(cls):
            return cls()

        def log(self, name, value, description="", step=None):
            sent.append((step, name, value))

        def add_properties(self, values):
            properties.update(values)

    module(monkeypatch, "azureml.core.run", Run=Run)
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback(["azure_ml"])])
    trainer.train()
    losses = [(entry["step"], "loss", entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert [one for one in sent if one[1] == "loss"] == losses
    assert properties["plan/total_steps"] == "4"


def test_dagshub_is_mlflow_on_the_repository_at_hand(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    address = f"sqlite:///{tmp_path}/hub.db"
    module(monkeypatch, "dagshub", init=lambda mlflow: sys.modules["mlflow"].set_tracking_uri(address))
    try:
        make_trainer(tmp_path, **SHORT, run_name="mine", callbacks=[TrackerCallback(["dagshub"])]).train()
        client = mlflow.MlflowClient(address)
        (run,) = client.search_runs([client.get_experiment_by_name("huggingface").experiment_id])
        assert run.info.run_name == "mine" and "loss" in run.data.metrics
    finally:
        mlflow.set_tracking_uri(None)


def test_flyte_shows_the_logs_and_keeps_the_checkpoints(tmp_path, monkeypatch):
    decks, kept = {}, []
    checkpoint = types.SimpleNamespace(save=lambda path: kept.append(sorted(item.name for item in tmp_path.glob("checkpoint-*"))))
    context = types.SimpleNamespace(checkpoint=checkpoint)
    module(monkeypatch, "flytekit", Deck=lambda name, html: decks.update({name: html}), current_context=lambda: context)
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **SHORT, **settings, callbacks=[FlyteCallback]).train()
    assert kept == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]  # each is complete when it is given over
    assert decks["Log History"].count("<tr>") == 4 and "train_loss" in decks["Log History"]


def test_flyte_outside_the_main_process_does_nothing():
    state = TrainerState(is_world_process_zero=False)
    FlyteCallback().on_save(arguments("unused"), state, None)
    FlyteCallback().on_train_end(arguments("unused"), state, None)


def test_codecarbon_measures_training_alone(tmp_path):
    pytest.importorskip("codecarbon")
    trainer = make_trainer(tmp_path, **SHORT, run_name="mine", callbacks=[TrackerCallback(["codecarbon"])])
    trainer.train()
    trainer.evaluate()
    head, *runs = (tmp_path / "emissions.csv").read_text().splitlines()
    assert [row.split(",")[head.split(",").index("project_name")] for row in runs] == ["mine"]


def test_neptune_gets_facts_and_series(tmp_path, monkeypatch):
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

    module(monkeypatch, "neptune", init_run=Run)
    monkeypatch.setenv("NEPTUNE_PROJECT", "me/tests")
    callback = TrackerCallback(["neptune"])
    make_trainer(tmp_path, **SHORT, run_name="mine", callbacks=[callback]).train()
    assert opened == [{"name": "mine", "project": "me/tests"}, "stopped"]
    assert [step for step, _ in series["finetuning/train/loss"]] == [2, 4]
    assert fields["finetuning/parameters/plan/total_steps"] == 4
    assert callback.runs == {"neptune": "FTS-1"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A TrainJob around the run: an HTTPS server with a certificate of its own, and a token in a file."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    key, certificate, token = (tmp_path / name for name in ("key.pem", "cert.pem", "token"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    token.write_text("sesame\n")
    received = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Authorization"], json.loads(body)["trainerStatus"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://localhost:{server.server_port}/status")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(certificate))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(token))
    yield received
    server.shutdown()
    thread.join()
    server.server_close()


def test_kubeflow_hears_how_far_it_is(tmp_path, job, monkeypatch):
    monkeypatch.setattr("fts.trainer.trackers.kubeflow.SAMPLING_SECONDS", 0.0)
    trainer = make_trainer(tmp_path, **SHORT, report_to="kubeflow")
    trainer.train()
    assert {(path, head) for path, head, _ in job} == {("/status", "Bearer sesame")}
    progress = [status["progressPercentage"] for _, _, status in job]
    assert progress == [0, 50, 100, 100, 100]  # begun, two logs, the figures of the run, ended
    figures = {one["name"]: one["value"] for one in job[-1][2]["metrics"]}
    assert float(figures["loss"]) == trainer.state.log_history[-2]["loss"]
    assert job[-1][2]["estimatedRemainingSeconds"] == 0


def test_kubeflow_is_not_asked_at_each_log(tmp_path, job):
    make_trainer(tmp_path, max_steps=20, logging_steps=1, report_to="kubeflow").train()
    assert 2 <= len(job) <= 4
    assert job[-1][2]["progressPercentage"] == 100


def test_kubeflow_needs_a_job(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(ArgumentError, match=r"report_to=\['kubeflow'\] needs a TrainJob of Kubeflow .* Leave 'kubeflow' out"):
        TrainingArguments(report_to="kubeflow")
