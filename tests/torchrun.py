"""Runs a script in several processes, started as a user would, and reads what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(*words, timeout=600):
    """Run Python as a command line has it; the finished process, with its output as text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)


def start(script, *arguments, processes=2, timeout=600, launcher=()):
    """Run the file of a script under torchrun, which also takes what `launcher` says, such as ("--max-restarts", "1")."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words = ["-m", "torch.distributed.run", "--nproc-per-node", processes, *meeting, *launcher]
    return python(*words, script, *arguments, timeout=timeout)


def result(script, file, *, processes=2):
    """What the processes wrote as JSON to a file, which the script is given; one process runs without a launcher."""
    done = python(script, file) if processes == 1 else start(script, file, processes=processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-12000:]
    return json.loads(Path(file).read_text(encoding="utf-8"))


def results(script, folder, *arguments, **options):
    """What each process wrote as JSON to `folder/<rank>.json`, in the order of ranks; the script is given the folder first."""
    done = start(script, folder, *arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-12000:]
    paths = sorted(Path(folder).glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in paths]
