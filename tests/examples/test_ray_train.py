"""The example of Ray Train, on a real local cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_two_workers_learn_digits_and_report_to_ray(tmp_path):
    for package in ("ray.train", "sklearn", "transformers"):
        pytest.importorskip(package)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(tmp_path.parents[1]),  # paths of sockets must be short
        # Ray starts slowly on a busy machine
        "RAY_raylet_start_wait_time_s": "240",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240",
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, str(ROOT / "examples" / "ray_train.py"), "--output", str(tmp_path), "--steps", "200"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "reported to Ray at step 200: accuracy 9" in done.stdout

    kept = sorted((tmp_path / "ray" / "digits").glob("checkpoint_*/trainer_state.json"))
    states = [json.loads(file.read_text()) for file in kept]
    assert [state["global_step"] for state in states] == [100, 200]
    # each step has 64 of 1397 examples, on two workers
    assert states[-1]["epoch"] == pytest.approx(200 / -(-1397 // 64), abs=0.1)
