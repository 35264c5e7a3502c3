"""The demo in several processes, launched as the README says."""

import pytest

from tests import torchrun

ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0", "--use_fsdp", "--fsdp_version", "2"]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate, FSDP2"])
def test_the_demo_runs_in_two_processes(launcher, tmp_path):
    script = [torchrun.ROOT / "examples" / "sentiment.py", "charming", "--epochs", 0.02, "--output", tmp_path]
    done = torchrun.start(*script) if launcher == "torchrun" else torchrun.python(*ACCELERATE, *script)
    text = done.stdout + done.stderr
    assert done.stdout.count("model and learning_curve.png are in") == 1, text[-6000:]  # only the main process prints
    assert "at least 0.83 was expected" in text  # after so few words
    assert (tmp_path / "model.safetensors").exists()
