"""The demo in several processes, launched as the README says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0", "--use_fsdp", "--fsdp_version", "2"]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate-fsdp2"])
def test_the_demo_runs_in_two_processes(launcher, tmp_path):
    script = [str(ROOT / "examples" / "sentiment.py"), "charming", "--epochs", "0.02", "--output", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, env=env, timeout=600, check=False)
    text = done.stdout + done.stderr
    assert done.stdout.count("model and learning_curve.png are in") == 1, text[-6000:]  # the first process tells
    assert "at least 0.83 was expected" in text  # after so few words
    assert (tmp_path / "model.safetensors").exists()
