"""Installed trackers: what they stored is read back by their own readers."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("tracked_run.py")
ROOT = Path(__file__).parents[3]
SPEED = ("runtime", "_per_second")


def local(directory):
    """Settings by which trackers write only to this directory."""
    return {
        "AIM_REPO": str(directory),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "TRACKIO_DIR": str(directory / "trackio"),
        "WANDB_DIR": str(directory),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    @cache
    def run(name):
        pytest.importorskip(name)
        directory = tmp_path_factory.mktemp(name)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | local(directory)
        done = subprocess.run(
            [sys.executable, str(PROGRAM), name, str(directory)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "The tracker" not in done.stderr, done.stderr
        assert "sesame" not in "".join(path.read_bytes().decode("latin-1") for path in directory.rglob("*") if path.is_file())
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        return json.loads(line.removeprefix("FOUND "))

    return run


def grouped(name):
    for split in ("eval", "test"):
        if name.startswith(f"{split}_"):
            return name.replace("_", "/", 1)
    return f"train/{name}"


def logged(entries, rename):
    """The logs of the Trainer: name -> [[step, value], ...]."""
    metrics = {}
    for entry in entries:
        for name, value in entry.items():
            if name != "step":
                metrics.setdefault(rename(name), []).append([entry["step"], value])
    return metrics


def resumed(result, again):
    """All logs: of the run that crashed, and of the one that resumed from step 2."""
    crashed = result["crashed"] if again else [entry for entry in result["crashed"] if entry["step"] <= 2]
    return [*crashed, *(entry for entry in result["history"] if entry["step"] > 2)]


@pytest.mark.parametrize(
    ("name", "rename", "again"),
    [
        ("tensorboard", grouped, False),  # it drops the logs after the checkpoint
        ("mlflow", str, True),
        ("trackio", grouped, True),
        ("wandb", grouped, True),
        ("dvclive", grouped, True),
        ("aim", grouped, False),  # it has one value of a step: the latest
    ],
)
def test_every_metric_is_stored_at_its_step(found, name, rename, again):
    result = found(name)
    expected = logged(resumed(result, again), rename)
    assert result["runs"] == 1  # a resumed run continues, and a later evaluation belongs to it
    if name == "aim":
        expected = {metric: [list(pair) for pair in dict(values).items()] for metric, values in expected.items()}
    for metric, values in expected.items():
        assert result["metrics"][metric] == [[step, pytest.approx(value, rel=1e-5)] for step, value in values], metric
    loss = rename("test_loss")
    assert result["metrics"][loss] == [[6, pytest.approx(result["history"][-1]["eval_loss"])]]  # predict, on the same examples
    assert len(result["metrics"][rename("loss")]) == (4 if again else 3)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio", "wandb", "dvclive", "aim"])
def test_the_config_is_stored_once_and_without_secrets(found, name):
    (config,) = found(name)["configs"]
    assert "hub_token" not in config
    assert {key: float(config[key]) for key in ("learning_rate", "plan/total_steps", "model/num_parameters")} == {
        "learning_rate": 0.01,
        "plan/total_steps": 6,
        "model/num_parameters": 65,
    }
    assert config["environment/torch"]


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb", "aim"])
def test_the_run_has_its_name(found, name):
    assert found(name)["name"] == "mine"


def test_a_crashed_run_is_marked_as_failed(found):
    assert found("wandb")["exits"] == [1, 0, 0, 0]  # the crash, the resumed run, evaluate, predict
    assert found("mlflow")["status"] == "FINISHED"
