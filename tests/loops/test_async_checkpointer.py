import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import optree
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import fts
from fts import loops, steps, transforms as tx
from fts.errors import ArgumentError, CheckpointError, Interrupted
from fts.loops import AsyncCheckpointer, Position, load_checkpoint, newest_checkpoint, verify_checkpoint
from fts.loops.checkpoint_status import is_complete

OPTIMIZER = tx.adamw(1e-2)


def state_at(step, size=12):
    state = fts.TrainState.create({"w": torch.full((size,), float(step)), "b": torch.arange(3.0)}, OPTIMIZER, seed=7)
    return state.replace(step=torch.tensor(step))


def number(path):
    return int(path.name.removeprefix("checkpoint-"))


def step_of(path, size=12):
    state, _ = load_checkpoint(path, like=state_at(0, size))
    assert torch.equal(state.params["w"], state_at(int(state.step), size).params["w"])
    return int(state.step)


def test_what_is_saved_is_the_state_of_the_save_although_steps_overwrite_it(tmp_path):
    net = torch.nn.Linear(64, 64)
    step = steps.train_step(steps.module_loss(net, lambda model, x: model(x).square().mean()), OPTIMIZER)
    data = list(torch.randn(6, 8, 64))
    every = loops.cadence(save=1)
    state = fts.TrainState.create(net, OPTIMIZER)
    expected = {}
    for event in loops.fit(step, state, data, donate=False):
        if isinstance(event, loops.StepEnd):
            expected[event.counters.step] = event.state

    with AsyncCheckpointer() as writer:

        def save(state, position):
            return writer.save(tmp_path / f"checkpoint-{int(state.step)}", state, position)

        events = writer.watch(loops.fit(step, fts.TrainState.create(net, OPTIMIZER), data, due=every, save=save, donate=True))
        assert sum(isinstance(event, loops.Saved) for event in events) == 6
        assert {number(path) for path in tmp_path.iterdir()} == set(expected)  # the last one is durable when `fit` ends
    for count, there in expected.items():
        loaded, position = load_checkpoint(tmp_path / f"checkpoint-{count}", like=state)
        assert position == Position(0, count)
        for name, tensor in there.params.items():
            assert torch.equal(loaded.params[name], tensor)
        assert all(map(torch.equal, optree.tree_leaves(loaded.opt_state), optree.tree_leaves(there.opt_state)))


def test_the_copy_is_made_before_save_returns(tmp_path):
    state = state_at(3, 1_000_000)
    with AsyncCheckpointer() as writer:
        path = writer.save(tmp_path / "checkpoint-3", state)
        state.params["w"].fill_(-1.0)
        writer.wait()
        assert step_of(path, 1_000_000) == 3


def test_the_second_save_uses_the_memory_of_the_first(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fts")
    with AsyncCheckpointer() as writer:
        places = []
        for step in range(3):
            writer.save(tmp_path / f"checkpoint-{step}", state_at(step, 500_000))
            places.append((writer._staging.memory.data_ptr(), writer.nbytes))
        assert len(set(places)) == 1
        # the weights, two moments and less than a page a file
        assert 3 * 2_000_000 < writer.nbytes < 3 * 2_000_000 + 4 * 4096
        assert [record.getMessage() for record in caplog.records] == [
            "Checkpoints are written asynchronously from a copy of the state: 6 MiB."
        ]
    assert [step_of(tmp_path / f"checkpoint-{step}", 500_000) for step in range(3)] == [0, 1, 2]


def test_states_may_change_their_tensors_between_saves(tmp_path):
    with AsyncCheckpointer() as writer:
        for step, size in enumerate((10, 100_000, 50, 100_000, 0)):
            path = writer.save(tmp_path / f"checkpoint-{step}", state_at(step, size))
            writer.wait()
            assert step_of(path, size) == step
        assert writer.nbytes < 1_300_000
    assert writer.nbytes == 0


def odd_state():
    base = torch.randn(6, 4)
    buffers = {
        "half": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "count": torch.tensor(5),
        "wave": torch.randn(3, dtype=torch.complex64),
        "turned": torch.randn(3, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "eighth": torch.randn(3).to(torch.float8_e4m3fn),
        'a "quoted" näme\n': torch.ones(1),
    }
    params = {"transposed": base.t(), "part": base[2:4], "full": base, "strided": base[:, ::2], "scalar": torch.tensor(2.0)}
    state = fts.TrainState.create(params, tx.identity(), copy=False)
    return state.replace(buffers=buffers)


@pytest.mark.parametrize("background", [True, False])
def test_tensors_of_any_form_are_read_by_safetensors_itself(tmp_path, background):
    state = odd_state()
    with AsyncCheckpointer(background=background) as writer:
        path = writer.save(tmp_path / "checkpoint-0", state)
    found = load_file(path / "model.safetensors")
    expected = state.params | state.buffers
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8) if tensor.ndim else found[name], bits(tensor)), name
    loaded, _ = load_checkpoint(path, like=state)
    assert torch.equal(loaded.params["strided"], state.params["strided"])


def bits(tensor):
    return tensor.resolve_conj().contiguous().view(torch.uint8) if tensor.ndim else tensor


def test_both_modes_write_the_same_files(tmp_path):
    state = odd_state()
    with AsyncCheckpointer() as writer:
        one = writer.save(tmp_path / "a", state, Position(1, 2), extra={"k": 1}, shard_size=64)
    two = loops.save_checkpoint(tmp_path / "b", state, Position(1, 2), extra={"k": 1}, shard_size=64)
    names = {path.name for path in one.iterdir()}
    assert "model.safetensors.index.json" in names and names == {path.name for path in two.iterdir()}
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_additional_files_are_written_before_save_returns(tmp_path):
    threads = []

    def write(hidden):
        threads.append(threading.current_thread())
        (hidden / "config.json").write_text("{}")
        (hidden / "model.safetensors").write_bytes(b"what the state replaces")

    with AsyncCheckpointer() as writer:
        path = writer.save(tmp_path / "checkpoint-4", state_at(4), write=write)
        assert threads == [threading.main_thread()]
    assert step_of(path) == 4
    assert "config.json" in json.loads((path / "manifest.json").read_text())["files"]


def test_a_failing_hook_leaves_nothing_and_the_checkpointer_usable(tmp_path):
    with AsyncCheckpointer() as writer:
        with pytest.raises(ZeroDivisionError):
            writer.save(tmp_path / "checkpoint-1", state_at(1), write=lambda hidden: 1 / 0)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ArgumentError, match="must be JSON-serializable"):
            writer.save(tmp_path / "checkpoint-1", state_at(1), extra={"a": object()})
        with pytest.raises(ArgumentError, match="has no `save`"):
            writer.save(tmp_path / "checkpoint-1", {"w": 1})
        writer.save(tmp_path / "checkpoint-1", state_at(1))
    assert step_of(tmp_path / "checkpoint-1") == 1


def test_a_directory_without_a_state(tmp_path):
    path, seen = tmp_path / "model", []
    with AsyncCheckpointer() as writer:
        writer.write_directory(
            path, lambda hidden: (hidden / "a.txt").write_text("a"), on_complete=lambda: seen.append(path.is_dir())
        )
        writer.wait()
        assert seen == [True]
        assert json.loads((path / "manifest.json").read_text())["files"]["a.txt"]["size"] == 1
        assert writer.nbytes == 0


class Pair:
    """A state of a user's own."""

    def __init__(self, one, two):
        self.one, self.two = one, two

    def save(self, directory):
        self.one.save(directory)
        self.two.save(directory / "second")


def test_custom_states_are_written_before_save_returns(tmp_path):
    one, two = state_at(1), state_at(2)
    with AsyncCheckpointer() as writer:
        path = writer.save(tmp_path / "checkpoint-1", Pair(one, two))
        for state in (one, two):
            state.params["w"].zero_()
    verify_checkpoint(path)
    assert step_of(path) == 1
    assert load_file(path / "second" / "model.safetensors")["w"][0] == 2.0
    with pytest.raises(ArgumentError, match=r"Bare\.save did not write.*model\.safetensors"):
        AsyncCheckpointer().save(tmp_path / "checkpoint-2", type("Bare", (), {"save": lambda self, directory: None})())


def test_the_same_directory_twice(tmp_path):
    with AsyncCheckpointer() as writer:
        for step in (1, 2, 3):
            path = writer.save(tmp_path / "last", state_at(step))
    assert step_of(path) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_one_save_is_in_progress_and_the_next_waits(tmp_path):
    gate, writer = threading.Event(), AsyncCheckpointer()
    writer.save(tmp_path / "checkpoint-1", state_at(1), on_complete=gate.wait)
    second = threading.Thread(target=writer.save, args=(tmp_path / "checkpoint-2", state_at(2)))
    second.start()
    time.sleep(0.2)
    assert second.is_alive() and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    gate.set()
    second.join()
    writer.close()
    assert step_of(tmp_path / "checkpoint-2") == 2


def test_what_follows_runs_when_the_checkpoint_is_durable_and_before_the_end_of_the_run(tmp_path):
    seen = []

    def then():
        time.sleep(0.2)
        seen.append(is_complete(tmp_path / "checkpoint-1"))

    def step(state, batch):
        return state, {}

    with AsyncCheckpointer() as writer:
        save = partial(lambda state, position: writer.save(tmp_path / "checkpoint-1", state, position, on_complete=then))
        for event in writer.watch(loops.fit(step, state_at(1), [1], save=save)):
            if isinstance(event, loops.Stopped):
                assert seen == [True]


def test_without_a_thread_all_is_done_when_save_returns(tmp_path):
    with AsyncCheckpointer(background=False) as writer:
        seen = []
        path = writer.save(tmp_path / "checkpoint-1", state_at(1), on_complete=lambda: seen.append(threading.current_thread()))
        assert seen == [threading.main_thread()] and step_of(path) == 1 and writer.nbytes == 0
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="could not be written"):
            writer.save(tmp_path / "file" / "checkpoint-1", state_at(1))


# -- faults -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request, tmp_path):
    disk, image = tmp_path / "disk", tmp_path / "image"
    disk.mkdir()
    if request.param == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]]
    else:
        image.write_bytes(bytes(4 * 2**20))
        commands = [["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, disk]]
    for command in commands:
        if shutil.which(command[0]) is None or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("cannot mount")
    shutil.rmtree(disk / "lost+found", ignore_errors=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_surfaces_after_a_step_with_its_cause(small_disk):
    def step(state, batch):
        time.sleep(0.05)
        return state.replace(step=state.step + 1), {}

    with AsyncCheckpointer() as writer:
        writer.save(small_disk / "checkpoint-1", state_at(1))
        writer.wait()

        def save(state, position):
            return writer.save(small_disk / f"checkpoint-{int(state.step)}", state, position)

        with pytest.raises(
            CheckpointError, match=r"checkpoint-2 could not be written.*No space left.*Earlier checkpoints are complete"
        ) as caught:
            for _ in writer.watch(loops.fit(step, state_at(1, 500_000), range(100), due=loops.cadence(save=2), save=save)):
                pass
        assert isinstance(caught.value.__cause__, OSError)
        assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]
        assert step_of(newest_checkpoint(small_disk)) == 1
        writer.poll()  # it was raised once
        writer.save(small_disk / "checkpoint-3", state_at(3))
    assert step_of(newest_checkpoint(small_disk)) == 3


@pytest.mark.parametrize("how", ["poll", "wait", "save", "close"])
def test_an_error_behind_is_raised_once_by_whatever_comes_next(tmp_path, how):
    def fail():
        raise KeyError("retention")

    writer = AsyncCheckpointer()
    writer.save(tmp_path / "checkpoint-1", state_at(1), on_complete=fail)
    writer._thread.join()
    again = {"save": lambda: writer.save(tmp_path / "checkpoint-2", state_at(2))}
    with pytest.raises(
        CheckpointError, match=r"checkpoint-1 is complete, but the callback after its save failed.*retention"
    ) as caught:
        again.get(how, getattr(writer, how))()
    assert isinstance(caught.value.__cause__, KeyError)
    writer.poll()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert step_of(tmp_path / "checkpoint-1") == 1


def test_the_error_of_a_block_is_not_masked(tmp_path):
    def fail():
        raise OSError("the disk went away")

    with pytest.raises(ValueError, match="of the loop") as caught, AsyncCheckpointer() as writer:
        writer.save(tmp_path / "checkpoint-1", state_at(1), on_complete=fail)
        raise ValueError("of the loop")
    assert "the disk went away" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError, match="the disk went away"), AsyncCheckpointer() as writer:
        writer.save(tmp_path / "checkpoint-1", state_at(1), on_complete=fail)


def test_an_error_of_a_block_waits_for_the_save_and_an_interruption_does_not(tmp_path):
    gate, writer = threading.Event(), AsyncCheckpointer()
    with pytest.raises(Interrupted), writer:
        writer.save(tmp_path / "checkpoint-1", state_at(1), on_complete=gate.wait)
        raise Interrupted(143, "SIGTERM")
    assert writer._thread.is_alive()
    gate.set()
    writer.close()
    done = []
    with pytest.raises(ZeroDivisionError), writer:
        writer.save(tmp_path / "checkpoint-2", state_at(2), on_complete=lambda: (time.sleep(0.2), done.append(2)))
        1 / 0  # noqa: B018
    assert done == [2]


@pytest.mark.parametrize("end", ["raise ValueError", "sys.exit(3)", "pass"])
def test_a_program_that_ends_lets_the_save_finish(tmp_path, end):
    program = f"""
import sys, time, torch, fts
from fts import loops, transforms as tx
state = fts.TrainState.create({{"w": torch.ones(3_000_000)}}, tx.adamw(1e-2))
writer = loops.AsyncCheckpointer()
writer.save({str(tmp_path / "checkpoint-1")!r}, state, on_complete=lambda: (time.sleep(0.5), print("done", flush=True)))
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == {"raise ValueError": 1, "sys.exit(3)": 3, "pass": 0}[end], done.stderr
    assert done.stdout == "done\n"
    verify_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("milliseconds", [2, 5, 9, 14, 20, 35])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path, milliseconds):
    loops.save_checkpoint(tmp_path / "checkpoint-0", state_at(0, 300_000))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            writer = AsyncCheckpointer()
            os.write(writing, b"x")
            for step in range(1, 10**6):
                writer.save(tmp_path / f"checkpoint-{step}", state_at(step, 300_000))
                writer.save(tmp_path / "checkpoint-0", state_at(step, 300_000))
        finally:
            os._exit(1)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    time.sleep(milliseconds / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = newest_checkpoint(tmp_path)
    assert step_of(newest, 300_000) == number(newest)
    step_of(tmp_path / "checkpoint-0", 300_000)
    assert all(is_complete(path) for path in tmp_path.glob("checkpoint-*"))


def test_workers_may_be_forked_during_a_save(tmp_path):
    data = torch.arange(64.0)
    with AsyncCheckpointer() as writer:
        for step in range(4):
            path = writer.save(tmp_path / f"checkpoint-{step}", state_at(step, 2_000_000))
            total = sum(batch.sum() for batch in DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork"))
            assert total == data.sum()
            writer.wait()
            assert step_of(path, 2_000_000) == step


def test_a_forked_child_can_save_with_a_writer_of_its_own(tmp_path):
    with AsyncCheckpointer() as writer:
        writer.save(tmp_path / "checkpoint-1", state_at(1, 2_000_000))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with AsyncCheckpointer() as own:
                    own.save(tmp_path / "checkpoint-2", state_at(2))
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    assert step_of(tmp_path / "checkpoint-2") == 2
    assert step_of(tmp_path / "checkpoint-1", 2_000_000) == 1


def test_directories_are_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with AsyncCheckpointer() as writer:
        assert writer.save("deep/checkpoint-1", state_at(1)) == Path("deep/checkpoint-1")
    assert step_of(tmp_path / "deep" / "checkpoint-1") == 1


NO_MEMORY = """
import resource, sys
from pathlib import Path
from fts.loops import AsyncCheckpointer
from tests.loops.test_async_checkpointer import SIZE, state_at

state, root = state_at(1, SIZE), Path(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
with AsyncCheckpointer() as writer:
    for step in (1, 2):
        writer.save(root / f"checkpoint-{step}", state)
        assert (root / f"checkpoint-{step}").is_dir()
"""
SIZE = 10**7


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the memory")
def test_without_memory_for_the_copy_it_is_written_at_once(tmp_path):
    command = [sys.executable, "-c", NO_MEMORY, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("async_save=False") == 1
    assert [step_of(tmp_path / f"checkpoint-{step}", SIZE) for step in (1, 2)] == [1, 1]


@pytest.mark.parametrize("background", [True, False])
def test_of_two_writers_of_the_same_checkpoint_the_first_one_raises(tmp_path, background):
    first, second = AsyncCheckpointer(background), AsyncCheckpointer(background)

    def write(hidden):
        second.save(tmp_path / "checkpoint-1", state_at(2))
        second.wait()

    with pytest.raises(CheckpointError, match="another run began to write the same checkpoint"):
        first.save(tmp_path / "checkpoint-1", state_at(1), write=write)
        first.wait()
    assert step_of(tmp_path / "checkpoint-1") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_two_concurrent_writers_leave_a_complete_checkpoint(tmp_path):
    size, path = 300_000, tmp_path / "checkpoint-1"
    barrier, errors = threading.Barrier(2), []

    def write(step):
        writer = AsyncCheckpointer()
        barrier.wait()
        try:
            writer.save(path, state_at(step, size))
            writer.wait()
        except CheckpointError as error:
            errors.append(str(error))

    for _ in range(20):
        errors.clear()
        threads = [threading.Thread(target=write, args=(step,)) for step in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert step_of(path, size) in (1, 2) and len(errors) < 2, errors
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
