"""Kubeflow Trainer, by a local HTTPS server."""

import http.server
import json
import shutil
import ssl
import subprocess
import threading

import pytest

from fts.errors import ArgumentError
from fts.trainer import TrainingArguments
from tests.trainer.helpers import make_trainer

SHORT = {"max_steps": 4, "logging_steps": 2}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A TrainJob around the run: a local HTTPS server with its own certificate, and a token in a file."""
    if shutil.which("openssl") is None:
        pytest.skip("creates a certificate with openssl")
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


def test_kubeflow_gets_the_progress(tmp_path, job, monkeypatch):
    monkeypatch.setattr("fts.trainer.trackers.kubeflow.INTERVAL", 0.0)
    trainer = make_trainer(tmp_path, **SHORT, report_to="kubeflow")
    trainer.train()
    assert {(path, head) for path, head, _ in job} == {("/status", "Bearer sesame")}
    progress = [status["progressPercentage"] for _, _, status in job]
    assert progress == [0, 50, 100, 100, 100]  # start, two logs, the metrics of the run, end
    metrics = {one["name"]: one["value"] for one in job[-1][2]["metrics"]}
    assert float(metrics["loss"]) == trainer.state.log_history[-2]["loss"]
    assert job[-1][2]["estimatedRemainingSeconds"] == 0


def test_kubeflow_does_not_report_each_log(tmp_path, job):
    make_trainer(tmp_path, max_steps=20, logging_steps=1, report_to="kubeflow").train()
    assert 2 <= len(job) <= 4
    assert job[-1][2]["progressPercentage"] == 100


def test_kubeflow_needs_a_job(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(
        ArgumentError, match=r"report_to=\['kubeflow'\] needs to run in a TrainJob of Kubeflow, .* Leave 'kubeflow' out"
    ):
        TrainingArguments(report_to="kubeflow")
