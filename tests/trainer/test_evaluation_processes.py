"""Several processes give the metrics and predictions of one, bit for bit."""

from pathlib import Path

import pytest

from tests import torchrun

SCRIPT = Path(__file__).parent / "run_evaluation_processes.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return torchrun.result(SCRIPT, tmp_path_factory.mktemp("alone") / "found.json", processes=1)


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluations_and_predictions_of_several_processes_are_those_of_one(processes, alone, tmp_path):
    found = torchrun.result(SCRIPT, tmp_path / "found.json", processes=processes)
    assert len(alone["same"]) == 19
    for name, value in alone["same"].items():
        assert found["same"][name] == value, name
    assert found["split"]["labels"] == alone["split"]["labels"]
    assert found["split"]["loss"] == pytest.approx(alone["split"]["loss"], rel=1e-6)
