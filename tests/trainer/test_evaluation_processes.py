"""Several processes give the figures and predictions of one, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import torchrun

SCRIPT = Path(__file__).parent / "evaluating.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    file = tmp_path_factory.mktemp("alone") / "found.json"
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(torchrun.ROOT)}
    done = subprocess.run([sys.executable, SCRIPT, file], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluations_and_predictions_of_several_processes_are_those_of_one(processes, alone, tmp_path):
    done = torchrun.start(SCRIPT, tmp_path / "found.json", processes=processes)
    assert done.returncode == 0, done.stderr[-12000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(alone["same"]) == 19
    for name, value in alone["same"].items():
        assert found["same"][name] == value, name
    assert found["split"]["labels"] == alone["split"]["labels"]
    assert found["split"]["loss"] == pytest.approx(alone["split"]["loss"], rel=1e-6)
