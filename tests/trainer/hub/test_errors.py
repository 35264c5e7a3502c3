"""What fails at the Hub loses no work, and stops no training."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fts.errors import HubError
from fts.trainer.hub.errors import describe_error, is_refusal, redact_secrets, status_of
from tests.trainer.helpers import Linear, make_trainer
from tests.trainer.hub.server import TOKEN

ROOT = Path(__file__).parents[3]


def pushing(tmp_path, **changes):
    settings = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "me/it", "max_steps": 4, "save_steps": 2}
    return make_trainer(tmp_path / "out", Linear(), **(settings | {"save_strategy": "steps"} | changes))


def is_complete(out):
    complete = all((out / f"checkpoint-{step}" / "manifest.json").is_file() for step in (2, 4))
    return complete and (out / "model.safetensors").is_file() and (out / "README.md").is_file()


FAULTS = {
    "401": ("POST .*/(commit|preupload)/", 401, "401 Unauthorized"),
    "403": ("POST .*/(commit|preupload)/", 403, "403 Forbidden"),
    "404": ("POST .*/preupload/", 404, "404 Not Found"),
    "409": ("POST .*/commit/", 409, "409 Conflict: a fault of POST /api/models/me/it/commit/main"),
    "412": ("POST .*/commit/", 412, "412 Precondition Failed"),
    "500": ("POST .*/commit/", 500, "500 Internal Server Error"),
    "storage": ("PUT /storage", 500, "500 Internal Server Error: a fault of PUT /storage"),
    "timeout": ("POST .*/commit/", "hang", "ReadTimeout"),
    "dropped": ("POST .*/commit/", "drop", "RemoteProtocolError: Server disconnected"),
}


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_warning_with_its_reason(tmp_path, hub, impatient, caplog, monkeypatch, fault, xet):
    pattern, answer, message = FAULTS[fault]
    if xet and fault == "storage":
        pytest.skip("xet's storage is another service")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.lfs = not xet
    trainer = pushing(tmp_path)
    hub.faults[pattern] = answer
    assert trainer.train().global_step == 4
    assert is_complete(tmp_path / "out")
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("fts")]
    assert warnings[-1].startswith("An upload failed; the run continues: me/it on the Hub did not accept 'End of training':")
    assert message in warnings[-1]
    assert "topsecret" not in " ".join(warnings)
    with pytest.raises(HubError, match=r"^me/it on the Hub did not accept 'Once more': "):
        trainer.push_to_hub("Once more")
    trainer.save_model()
    assert "The model is saved, but was not uploaded: me/it on the Hub did not accept 'Model save'" in caplog.text
    hub.faults.clear()
    trainer.push_to_hub("At last")
    assert hub.repos["me/it"].messages() == ["At last"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_an_unreachable_hub(tmp_path, hub, caplog):
    hub.close()
    trainer = pushing(tmp_path)
    assert "me/it on the Hub cannot be written to: ConnectError" in caplog.text
    assert "The first upload is another attempt" in caplog.text
    assert trainer.train().global_step == 4
    assert is_complete(tmp_path / "out")


@pytest.mark.parametrize("fault", [500, "drop", "hang"])
def test_a_hub_that_recovers_gets_everything(tmp_path, hub, impatient, caplog, fault):
    hub.faults["POST /api/repos/create"] = fault
    trainer = pushing(tmp_path, hub_revision="dev")
    assert trainer.hub_model_id is None
    assert "The first upload is another attempt" in caplog.text
    hub.faults.clear()
    trainer.train()
    assert trainer.hub_model_id == "me/it"
    assert hub.repos["me/it"].messages("dev")[-1] == "End of training"


def test_a_snapshot_that_cannot_be_taken(tmp_path, hub, caplog, monkeypatch):
    from fts.trainer.hub import snapshots

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = pushing(tmp_path)
    monkeypatch.setattr(snapshots.tempfile, "mkdtemp", full)
    assert trainer.train().global_step == 4
    assert "checkpoint-2 is not uploaded: OSError: [Errno 28] No space left on device. Training continues." in caplog.text
    assert "The final model was not uploaded: OSError" in caplog.text
    assert is_complete(tmp_path / "out")


def test_a_card_that_cannot_be_read(tmp_path, hub, caplog):
    trainer = pushing(tmp_path)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text("---\na: [\n---\nmine\n")
    assert trainer.train().global_step == 4
    assert "The model card could not be written: ArgumentError" in caplog.text
    assert (tmp_path / "out" / "README.md").read_text() == "---\na: [\n---\nmine\n"


def test_a_refusal_is_raised_before_training(tmp_path, hub):
    with pytest.raises(HubError, match="401"):
        pushing(tmp_path, hub_token="wrong")
    assert not (tmp_path / "out").exists()


class Answer:
    status_code, reason_phrase = 503, "Busy"


def test_error_descriptions():
    class ServerError(Exception):
        response, server_message = Answer(), f"no {TOKEN}, see https://s.example/a?sig=1"

    assert status_of(ServerError()) == 503
    assert not is_refusal(ServerError())
    assert describe_error(ServerError()) == "503 Busy: no <token>, see https://s.example/a"
    outer = RuntimeError("Error while uploading 'x' to the Hub.")
    outer.__cause__ = ServerError()
    assert describe_error(outer) == f"RuntimeError: {outer} {describe_error(ServerError())}"
    assert describe_error(ValueError("two\nlines sesame"), "sesame") == "ValueError: two lines <token>"
    assert redact_secrets("nothing to hide?") == "nothing to hide?"


SCRIPT = """
import sys
import torch
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Linear, make_trainer

class PrintsSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)
        if {pause} and state.global_step == 3:
            sys.stdin.readline()

trainer = make_trainer({out!r}, Linear(), push_to_hub=True, hub_model_id="it", max_steps={steps}, save_steps=2,
                       save_strategy="steps", callbacks=[PrintsSteps()])
trainer.train()
print("done", trainer.hub_model_id, flush=True)
"""


def start(hub, out, *, pause=False, steps=4):
    """A separate script that gets the Hub only from its environment."""
    names = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | names | {"PYTHONPATH": str(ROOT)}
    script = SCRIPT.format(out=str(out), pause=pause, steps=steps)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT, text=True, **pipes)


def test_a_script_with_its_environment(tmp_path, hub):
    output, errors = start(hub, tmp_path / "out").communicate()
    assert output.splitlines()[-1] == "done me/it", errors
    assert hub.repos["me/it"].messages()[-1] == "End of training"
    assert TOKEN not in output + errors


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_does_not_wait(tmp_path, hub, sent):
    hub.faults["POST .*/commit/"] = "hang"
    out = tmp_path / "out"
    process = start(hub, out, pause=True, steps=9)
    for line in process.stdout:
        if line == "3\n":
            break
    while not hub.matching_requests("/commit/"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate("\n")
    assert process.returncode == 128 + sent, errors
    assert (out / "checkpoint-3" / "manifest.json").is_file()
    assert "The run was stopped and does not wait for the upload of" in errors
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_the_next_run_deletes_the_snapshots_of_a_killed_one(tmp_path, hub, caplog):
    hub.faults["POST .*/commit/"] = "hang"
    out = tmp_path / "out"
    process = start(hub, out, pause=True, steps=9)
    while not hub.matching_requests("/commit/"):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert len(list(out.glob(".uploading-*"))) == 1
    hub.faults.clear()
    with caplog.at_level(logging.WARNING):
        trainer = pushing(tmp_path, hub_model_id="it", max_steps=9)
    assert list(out.glob(".uploading-*")) == []
    trainer.train(resume_from_checkpoint=True)
    assert hub.repos["me/it"].messages()[-1] == "End of training"
