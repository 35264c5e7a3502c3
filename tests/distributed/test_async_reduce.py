"""An asynchronous all-reduce of two real processes, one of which is killed at the end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.process_group import Group
from fts.distributed.rank_monitor import RankMonitor
from fts.errors import DistributedError
from tests import torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("async_reduce") / "found.json"
    done = torchrun.start(Path(__file__).with_name("run_async_reduce.py"), file)
    assert file.exists(), done.stderr[-3000:]
    assert "SIGKILL" in done.stderr
    return json.loads(file.read_text())


def test_results_come_one_call_late_on_all_ranks(found):
    assert found["answers"] == [0, 0, 0, 143, 0, 0, 4, 0, 0]  # the script asserts that both have the same
    assert found["pending"] and found["closed"]


def test_a_call_does_not_wait_for_a_rank_that_is_a_step_behind(found):
    assert found["seconds ahead"] < 0.9  # the other rank is a second late
    assert found["microseconds"] < 20_000  # about 100 where cores are free


def test_ranks_stop_at_the_same_step(found):
    step, reason = found["stopped"]
    assert reason == "asked"
    assert step in (6, 7)  # asked in the fifth


def test_ranks_save_by_time_at_the_same_steps(found):
    assert found["saved"] == ["5", "10", "15", "16"]  # due after 4 steps of the faster clock, one step late; and the end


def test_a_process_that_hangs(found):
    message, seconds = found["hangs"]
    assert message.startswith("Process 0 of 2 has waited for another one longer than the timeout (ddp_timeout)")
    assert 0.5 < seconds < 10


@pytest.mark.parametrize("where", ["is gone", "sum", "gather"])
def test_a_process_that_was_killed(found, where):
    message, seconds = found[where]
    assert message.startswith("Process 1 of 2 is gone: process 0 has lost the connection; the others stop.")
    assert "resume_from_checkpoint=True" in message
    assert seconds < 10


def test_a_single_process_gets_its_number_at_once():
    agree = AsyncAllReduceMax(Group())
    assert [agree(0), agree(7), agree(0)] == [0, 7, 0]
    agree.close()


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GLOO + "Connection closed by peer [127.0.0.1]:30091. This is typically caused by a remote worker crashing.",
            "has lost another one",
        ),
        (GLOO + "Read error [127.0.0.1]:1: Connection reset by peer", "has lost another one"),
        (GLOO + "Write error [127.0.0.1]:1: Broken pipe", "has lost another one"),
        (
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete",
            "has waited for another",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.21.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            "has lost another one",
        ),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6, OpType=ALLREDUCE)", "has waited for another"),
    ],
)
def test_messages_of_torch_about_other_ranks_are_translated(text, message):
    with (
        pytest.raises(DistributedError, match=f"Process 0 of 2 {message}") as caught,
        RankMonitor(Group(size=2)).translate_errors(),
    ):
        raise RuntimeError(text)
    assert str(caught.value.__cause__) == text
    assert "Start all processes again" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/gloo/allreduce.cc:1] Enforce fail: op.preamble.length <= op.nbytes. 4 vs 2"),
        RuntimeError("CUDA error: timeout"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError("Connection reset by peer"),
        torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"),
    ],
    ids=str,
)
def test_other_errors_stay_unchanged(error):
    with pytest.raises(type(error), match=re.escape(str(error))) as caught, RankMonitor(Group(size=2)).translate_errors():
        raise error
    assert caught.value is error


def test_a_dead_rank_and_a_living_one():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monitor = RankMonitor(Group(size=3), {1: ended.pid, 2: living.pid})
    try:
        while ended.poll() is None:
            pass
        assert monitor.dead_ranks() == [1]
    finally:
        living.communicate(b"\n")
    assert monitor.dead_ranks() == [1, 2]
