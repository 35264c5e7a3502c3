"""A run that is asked to stop by a signal finishes its update, saves, and leaves with a status that says why."""

import signal
import subprocess
import sys

import pytest
import torch

from tests.trainer.helpers import Regression, losses, make_trainer

SCRIPT = """
import os, pathlib, signal, sys
import torch
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Regression, make_trainer

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

torch.manual_seed(0)
make_trainer(pathlib.Path(sys.argv[1]), Regression(), num_train_epochs=2, logging_steps=1, callbacks=[Kill()]).train()
print("never")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_a_run_with_a_checkpoint(name, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (128 + getattr(signal, name), -getattr(signal, name)), done.stderr
    assert "never" not in done.stdout
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    torch.manual_seed(0)
    full = make_trainer(tmp_path / "full", Regression(), num_train_epochs=2, logging_steps=1)
    full.train()
    torch.manual_seed(0)
    resumed = make_trainer(tmp_path / "run", Regression(), num_train_epochs=2, logging_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(full)
    for one, two in zip(resumed.model.parameters(), full.model.parameters(), strict=True):
        assert torch.equal(one, two)
