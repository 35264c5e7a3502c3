"""Asynchronous all-reduces; at the end one process is killed. For test_async_reduce: `torchrun run_async_reduce.py FILE`."""

import json
import os
import signal
import sys
import time

import torch

from fts import loops
from fts.distributed import process_group
from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.errors import DistributedError
from fts.loops.preemption import StopRequest
from fts.loops.timer import every_interval

found = {}


def error_of(call):
    """The message of a DistributedError, and after how many seconds."""
    started = time.monotonic()
    try:
        call()
    except DistributedError as error:
        return [str(error), time.monotonic() - started]
    return None


def main(file):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops the survivor, which must write its results first
    group = process_group.init_process_group(device="cpu")

    # the second process asks at its third call; then both ask
    with AsyncAllReduceMax(group) as agree:
        numbers = [0, 0, 143 * group.rank, 0, 0, 3 + group.rank, 0, 0, 0]
        found["answers"] = [agree(number) for number in numbers]
        found["pending"] = agree.pending is not None
    found["closed"] = agree.pending is None and agree.process_group is None

    agree = AsyncAllReduceMax(group)
    time.sleep(1.0 * group.rank)
    started = time.perf_counter()
    agree(0)
    found["seconds ahead"] = time.perf_counter() - started
    for _ in range(20):
        agree(0)
        time.sleep(0.005)
    spent = []
    for _ in range(200):
        time.sleep(0.002)  # a step
        started = time.perf_counter()
        agree(0)
        spent.append(time.perf_counter() - started)
    found["microseconds"] = 1e6 * sorted(spent)[len(spent) // 2]
    agree.close()

    # one process is asked to stop: both stop at the same step
    request = StopRequest(agree=AsyncAllReduceMax(group))

    def step(state, batch):
        if group.rank == 1 and state == 4:
            request.ask()
        return state + 1, {}

    *_, last = loops.fit(step, 0, range(100), due=loops.with_stop(loops.cadence(), request))
    found["stopped"] = [last.state, request.reason]
    request.agree.close()

    # a timer of which one clock is faster: both save at the same steps, once each time
    now = 0.0

    def tick(state, batch):
        nonlocal now
        now += (3.0, 2.0)[group.rank]
        return state + 1, {}

    timer_agree = AsyncAllReduceMax(group)
    due = loops.cadence(save="10s", clock=lambda: now, agree=timer_agree)
    events = loops.fit(tick, 0, range(16), due=due, save=lambda state, position: str(state))
    found["saved"] = [str(event.path) for event in events if isinstance(event, loops.Saved)]
    timer_agree.close()
    assert every_interval("10s", agree=AsyncAllReduceMax(process_group.Group())).due() is False

    every_rank = group.all_gather_object(found)
    first, second = every_rank
    times = {"microseconds": 0, "seconds ahead": 0}
    assert first | times == second | times, every_rank

    # the second hangs longer than the timeout
    impatient, patient = AsyncAllReduceMax(group, timeout=1.0), AsyncAllReduceMax(group)
    impatient(0), patient(0)
    impatient(0), patient(0)
    if group.rank == 1:
        time.sleep(4.0)
        os.kill(os.getpid(), signal.SIGKILL)
    impatient(0)
    found["hangs"] = error_of(lambda: impatient(0))
    found["is gone"] = error_of(lambda: [patient(0) for _ in range(3)])

    def all_reduce():
        with patient.monitor.translate_errors():
            group.all_reduce(torch.ones(3))

    def all_gather_object():
        with patient.monitor.translate_errors():
            group.all_gather_object("a")

    found["sum"], found["gather"] = error_of(all_reduce), error_of(all_gather_object)
    with open(file, "w") as out:
        json.dump(found, out)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
