"""Ten kills; `make fuzz` makes two hundred. See `kills`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_runs_resume_with_the_result_of_runs_that_were_not_killed(capfd):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "tests.reliability.kills", "--kills", "10", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    with capfd.disabled():
        print(f"\n{last}", file=sys.stderr)  # of a worker of pytest, too
    assert last == "kills 10, lost 0"
