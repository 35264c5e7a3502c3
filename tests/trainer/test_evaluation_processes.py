"""Several processes give the figures and predictions of one, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "evaluating.py"
ROOT = Path(__file__).parents[2]


def run(processes, file):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
    start = [] if processes == 1 else [*launcher, "--rdzv-endpoint", "127.0.0.1:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *start, SCRIPT, file]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("alone") / "found.json")


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluations_and_predictions_of_several_processes_are_those_of_one(processes, alone, tmp_path):
    found = run(processes, tmp_path / "found.json")
    assert len(alone["same"]) == 19
    for name, value in alone["same"].items():
        assert found["same"][name] == value, name
    assert found["split"]["labels"] == alone["split"]["labels"]
    assert found["split"]["loss"] == pytest.approx(alone["split"]["loss"], rel=1e-6)
