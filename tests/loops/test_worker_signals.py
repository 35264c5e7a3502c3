"""Signals that reach the workers, too, as schedulers send them to every process of a job."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import Any

import attrs
import pytest
import torch

from fts import loops
from fts.errors import WorkerError
from tests.loops import run_preemption
from tests.loops.test_preemption import started, wait_for

ENVIRONMENT = os.environ | {"PYTHONPATH": str(run_preemption.__file__).partition("/tests/")[0], "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_all_processes_of_a_job_ends_it_after_its_step_with_a_checkpoint(name, tmp_path):
    number = getattr(signal, name)
    process = started(tmp_path, "workers")
    wait_for(process, "step 3")
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopped by {name}" in out and "Traceback" not in err
    state, position = loops.load_checkpoint(loops.newest_checkpoint(tmp_path), like=run_preemption.first_state())
    assert 3 <= int(state.step) <= 4 and position.batch == int(state.step)
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        os.killpg(process.pid, 0)


class Signalled:
    """A signal comes to the worker while it fetches each item, and a program that it starts gets the same."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        program.terminate()
        return torch.tensor([index, program.wait()])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_passes_it_over_and_what_it_starts_does_not(start):
    with loops.handle_preemption():
        batches = list(loops.source(Signalled(), batch_size=1, workers=1, multiprocessing_context=start).epoch(0))
    assert [batch[0].tolist() for batch in batches] == [[index, -signal.SIGTERM] for index in range(2)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@attrs.define
class Stuck:
    """Its second item takes for ever, in Python or in a library that blocks signals; `reached` is set when a worker is there."""

    deaf: bool
    reached: Any = attrs.field(factory=multiprocessing.Event)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.deaf:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        if index:
            self.reached.set()
        while index:
            time.sleep(1)
        return index


@pytest.mark.parametrize(("deaf", "code"), [(False, 0), (True, -signal.SIGKILL)])
def test_a_worker_that_does_not_end_by_itself_is_ended(deaf, code):
    data = Stuck(deaf)
    with loops.handle_preemption():
        batches = iter(loops.source(data, batch_size=1, workers=1).epoch(0))
        assert next(batches).tolist() == [0]
        assert data.reached.wait(120)  # otherwise the worker may end before it comes to that item
        (worker,) = multiprocessing.active_children()
        batches.close()
        del batches
        worker.join(120)
    assert worker.exitcode == code


class Numbers:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


def test_an_error_about_a_worker_waits_for_the_next_fetch_of_its_own_source():
    source = loops.source(Numbers(), batch_size=1, workers=1)
    batches = source.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    for _ in range(100_000):
        pass  # torch's handler of SIGCHLD has run: without a fetch it raises nothing
    with pytest.raises(WorkerError, match=r"DataLoader worker ended: process \d+ was killed by SIGKILL"):
        list(batches)
    assert len(list(source.epoch(0))) == 8


def test_an_error_about_a_worker_of_a_closed_source_is_of_no_concern_to_others():
    closed = loops.source(Numbers(), batch_size=1, workers=1, persistent_workers=True)
    assert len(list(closed.epoch(0))) == 8
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    closed.close()
    assert len(list(loops.source(Numbers(), batch_size=1, workers=1).epoch(0))) == 8


PERSISTENT = """
from torch.utils.data import DataLoader
from fts import loops
from fts.loops.worker_signals import iterate_ignoring_signals

loader = DataLoader(range(4), num_workers=2, persistent_workers=True)
with loops.handle_preemption():
    print(len(list(iterate_ignoring_signals(loader))))
"""


def test_a_program_ends_quietly_with_persistent_workers():
    run = subprocess.run([sys.executable, "-c", PERSISTENT], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "4\n", "")


class Marked:
    mark = None

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Marked.mark, callable(signal.getsignal(signal.SIGUSR1)), signal.pthread_sigmask(signal.SIG_BLOCK, [])


def mark(worker):
    Marked.mark = f"worker {worker}"


def test_the_function_that_workers_begin_with_is_called_and_without_a_request_they_are_as_torch_starts_them():
    options = {"batch_size": 1, "workers": 1, "collate": list, "worker_init_fn": mark}
    (found,) = loops.source(Marked(), **options).epoch(0)
    assert found == [("worker 0", False, set())]
    with loops.handle_preemption():
        (found,) = loops.source(Marked(), **options).epoch(0)
    assert found == [("worker 0", True, set())]
