import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fts import loops
from fts.errors import ArgumentError, FtsError, Interrupted
from fts.loops import Counters, Due, StopRequest, cadence, fit, handle_preemption, with_stop
from fts.loops.preemption import SignalHandler
from fts.steps import train_step
from tests.loops import run_preemption

SCRIPT = Path(run_preemption.__file__)
TAKEN = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def started(root, way):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(root), way],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_for(process, word):
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"no {word!r}: {process.stderr.read()}")


def straight(steps):
    step = train_step(run_preemption.loss, run_preemption.optimizer)
    *_, last = fit(step, run_preemption.first_state(), run_preemption.data, total_steps=steps, due=lambda at: Due())
    return last.state


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_and_a_status_of_its_own(name, tmp_path):
    number = getattr(signal, name)
    process = started(tmp_path, "once")
    wait_for(process, "step 3")
    process.send_signal(number)
    time.sleep(0.02)
    process.send_signal(number)  # schedulers often reach a process twice
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"stopped by {name}" in out and "Traceback" not in err and name in err
    path = loops.newest_checkpoint(tmp_path)
    state, position = loops.load_checkpoint(path, like=run_preemption.first_state())
    assert 3 <= int(state.step) <= 4 and position.batch == int(state.step)
    step = train_step(run_preemption.loss, run_preemption.optimizer)
    *_, last = fit(step, state, run_preemption.data, start=position, total_steps=10, due=lambda at: Due())
    assert torch.equal(last.state.params["w"], straight(10).params["w"])


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_complete(tmp_path):
    process = started(tmp_path, "twice")
    wait_for(process, "step 3")
    process.terminate()
    wait_for(process, "saving")
    time.sleep(0.2)
    began = time.monotonic()
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - began < 10  # the save would have taken 30 s
    assert process.returncode == 143 and "stopped by" not in out
    assert loops.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]  # nothing half-written is left


def test_an_evaluation_is_ended_too(tmp_path):
    process = started(tmp_path, "evaluation")
    wait_for(process, "evaluating")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)  # all of it would take 80 s
    assert process.returncode == 128 + signal.SIGUSR1
    assert "evaluated" not in out and "step" not in out
    assert loops.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_the_clock_asks_and_raises_nothing():
    def slow(state, batch):
        time.sleep(0.02)
        return state + 1, {}

    with handle_preemption(max_time=0.1) as request:
        *_, last = fit(slow, 0, range(1000), due=with_stop(cadence(), request))
    assert last.reason == "due" and request.reason == "max_time"
    assert 1 <= last.state < 100


def test_handlers_are_installed_for_the_context_alone():
    before = [signal.getsignal(number) for number in TAKEN]
    with handle_preemption():
        assert all(isinstance(signal.getsignal(number), SignalHandler) for number in TAKEN)
        inside = signal.getsignal(signal.SIGTERM)
        with handle_preemption():
            assert signal.getsignal(signal.SIGTERM) is not inside
        assert signal.getsignal(signal.SIGTERM) is inside
    assert [signal.getsignal(number) for number in TAKEN] == before
    with pytest.raises(KeyError), handle_preemption():
        raise KeyError
    assert [signal.getsignal(number) for number in TAKEN] == before


def test_after_the_block_a_signal_raises():
    with pytest.raises(Interrupted) as caught, handle_preemption() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.poll() and request.reason == "SIGTERM"
    assert caught.value.code == 143 and caught.value.reason == "SIGTERM"
    assert not isinstance(caught.value, (FtsError, Exception))
    with pytest.raises(KeyboardInterrupt) as caught, handle_preemption():
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.code == 130 and isinstance(caught.value, SystemExit)
    with pytest.raises(KeyError), handle_preemption():  # an error is not hidden
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError
    with pytest.raises(Interrupted), handle_preemption(max_time=0) as request:
        assert request.poll() and request.reason == "max_time"
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_raises_at_once_and_a_third_has_its_default_effect():
    before = signal.getsignal(signal.SIGTERM)
    reached = False
    with pytest.raises(Interrupted), handle_preemption(patience=0.0):
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
            reached = True
        finally:
            assert signal.getsignal(signal.SIGTERM) is before
    assert not reached


def test_signals_that_the_program_handles_or_ignores_are_left_alone():
    heard = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with handle_preemption() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not request.poll()
    finally:
        signal.signal(signal.SIGUSR1, old)
        signal.signal(signal.SIGTERM, ignored)
    assert heard == [signal.SIGUSR1]


def test_outside_the_main_thread_only_the_clock_asks(caplog):
    found = []

    def run():
        with handle_preemption(max_time=0) as request:
            found.append((signal.getsignal(signal.SIGTERM), request.poll(), request.reason))

    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.DEBUG, "fts.loops.preemption"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found == [(before, True, "max_time")]
    assert "main thread" in caplog.text


def test_all_processes_stop_where_one_was_signalled():
    codes = {}

    def process(rank):
        return StopRequest(agree=lambda code: max(codes.setdefault(rank, code), codes.get(1 - rank, 0)))

    one, other = process(0), process(1)
    other.ask(143)
    codes[1] = 143  # what an all-reduce would bring
    assert one.poll() and one.reason == "SIGTERM" and one.local_code == 0
    calls = []
    request = StopRequest(agree=lambda code: calls.append(code) or code)
    assert not request.poll()
    request.ask()
    assert request.poll() and request.poll()
    assert calls == [0, 2]  # an agreement is final: there is no further all-reduce


def test_due_and_a_request():
    request = StopRequest()
    due = with_stop(cadence(log=2, evaluate=2, save=2), request)
    assert not due(Counters(step=1))
    wanted = due(Counters(step=2))
    assert wanted.log and wanted.evaluate and wanted.save and not wanted.stop and not wanted.end_epoch
    request.ask()  # while something is done
    assert not wanted.evaluate and wanted.save and wanted.stop
    over = due(Counters(step=3, batch=1, moment="stop"))
    assert over.log and over.save and not over.evaluate
    assert not due(Counters(step=3, batch=1, moment="end")).evaluate


def test_a_request_in_the_last_step_of_an_epoch_is_saved_once():
    request = StopRequest()

    def step(state, batch):
        if state == 2:
            request.ask()
        return state + 1, {}

    saved = []

    def save(state, position):
        saved.append((state, position))
        return Path("x")

    due = with_stop(cadence(save="epoch"), request)
    *_, last = fit(step, 0, [1, 2, 3], epochs=2, due=due, save=save)
    assert last.state == 3 and saved == [(3, loops.Position(0, 3))]


@pytest.mark.parametrize("names", [["SIGNONE"], "SIGTERM", ["term"]])
def test_unknown_signals_are_errors(names):
    with pytest.raises(ArgumentError, match="signals="), handle_preemption(signals=names):
        pass
