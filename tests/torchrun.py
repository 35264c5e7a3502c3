"""Starts a script in several processes as a user would, and reads what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(script, *arguments, processes=2, timeout=300, environment=None, launcher=()):
    """Run a script under torchrun; the finished process, with its output as text.

    A script is given as the path of a file; what the launcher itself takes comes by `launcher`, such as ("--max-restarts", "1").
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *launcher, str(script), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)


def results(script, folder, *arguments, **options):
    """What each process wrote as JSON to `folder/<rank>.json`, in the order of ranks; the script is given the folder first."""
    done = start(script, folder, *arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-12000:]
    paths = sorted(Path(folder).glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in paths]
