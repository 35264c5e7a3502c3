"""Signals that come at bad moments: to one process of two, during a save, an evaluation, the first update; and a second one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fts import loops
from tests.trainer.helpers import Regression, make_trainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def started(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for(process, word):
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"no {word!r}: {process.stderr.read()}")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_two_processes_stop_at_the_same_step(name, tmp_path):
    script = Path(__file__).with_name("run_preemption.py")
    one, other = (started(script, tmp_path / "meeting", rank) for rank in (0, 1))
    wait_for(one, "running"), wait_for(other, "running")
    one.send_signal(getattr(signal, name))
    reported = [process.communicate(timeout=60) for process in (one, other)]
    stops = [re.search(r"stopped (\d+) saved \[(\d+)\] because (\w+)", out) for out, _ in reported]
    assert all(stops), reported
    assert stops[0].groups() == stops[1].groups()
    step, saved, reason = stops[0].groups()
    assert step == saved and 5 <= int(step) < 100_000 and reason == name
    status = 128 + getattr(signal, name)
    assert [one.returncode, other.returncode] == [status, status]  # also of the one that got no signal


PROGRAM = """
import os, pathlib, signal, sys, time
import torch
from fts import loops
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Regression, make_trainer

moment, root = sys.argv[1], pathlib.Path(sys.argv[2])

def ask():
    os.kill(os.getpid(), signal.SIGTERM)

class Model(Regression):
    def forward(self, x, labels=None):
        if moment == "first" and self.training and not hasattr(self, "asked"):
            self.asked = True
            ask()
        if moment == "evaluation" and not self.training:
            assert not hasattr(self, "asked"), "a second batch was evaluated"
            self.asked = True
            ask()
        return super().forward(x, labels)

class Saving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if moment == "save" and state.global_step == 3:
            ask()
    def on_step_end(self, args, state, control, **kwargs):
        if moment == "twice" and state.global_step == 4:
            ask()
            time.sleep(1.2)  # longer than the patience with repeated signals
            ask()
            time.sleep(30)
            print("too late")

torch.manual_seed(0)
options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4}
options["per_device_eval_batch_size"] = 2
make_trainer(root, Model(), callbacks=[Saving()], **options).train()
print("never")
"""


@pytest.mark.parametrize(("moment", "steps"), [("first", [1]), ("evaluation", [3, 4]), ("save", [3, 4]), ("twice", [3])])
def test_a_signal_at_a_critical_moment(moment, steps, tmp_path):
    """An update is completed, an evaluation ended and repeated when the run resumes; at most one update follows, and a save."""
    root = tmp_path / "run"
    process = started("-c", PROGRAM, moment, root)
    out, err = process.communicate(timeout=120)
    assert process.returncode in (143, -signal.SIGTERM), err
    assert "never" not in out and "too late" not in out
    there = sorted(int(path.name.removeprefix("checkpoint-")) for path in root.iterdir())
    assert set(there) <= set(steps) and there, there
    for path in root.iterdir():
        loops.verify_checkpoint(path)
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4}
    options["per_device_eval_batch_size"] = 2
    torch.manual_seed(0)
    full = make_trainer(tmp_path / "whole", Regression(), **options)
    full.train()
    torch.manual_seed(0)
    resumed = make_trainer(root, Regression(), **options)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    evaluated = [[entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in (full, resumed)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 3
