"""Real external faults, and what the user then sees.

After each, the last checkpoint is complete; without the fault, the run then resumes and ends bit for bit as one that had none.

    fault                                what the user sees
    a full disk                          CheckpointError: "checkpoint-6 could not be written: ... No space left on device"
    a limit on the size of files         the same, with "File too large"
    a disk that turns read-only          the same, with "Read-only file system"
    a directory that may not be written  the same, with "Permission denied"
    output_dir is a file                 ArgumentError before the first update
    output_dir is deleted                nothing: the next save creates it again
    a file of a checkpoint is missing,   CheckpointError that names the file; with resume_from_checkpoint=True a warning, and the
    truncated, or has a flipped bit      checkpoint before is used
    a data set, collator, model or       the error itself, with notes: in or before which step, which batch and examples, and
    loss raises                          which checkpoint was written
    a worker is killed, or exits         WorkerError (or torch's RuntimeError, at the signal) that says how, with these notes
    a callback raises                    CallbackError, of the error's class too, that names callback, event and step; a note
    compute_metrics raises               the error itself, with notes: after which step, and which checkpoint was written
    memory is exhausted                  the error itself with notes, or with auto_find_batch_size=True a smaller batch
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fts import loops
from fts.errors import ArgumentError, CallbackError, CheckpointError, FtsError
from fts.trainer import Trainer
from fts.trainer.data.collator import get_data_collator
from tests.reliability.small_runs import LAST_STEP, LOOPS, SETTINGS, Examples, result_of, run_trainer
from tests.trainer.helpers import Regression, arguments, make_examples, make_trainer

EACH_LOOP = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What runs without a fault lead to, by loop."""
    found = {}
    for name, loop in LOOPS.items():
        root = tmp_path_factory.mktemp("straight")
        loop(root)
        found[name] = result_of(root)
    return found


def newest_step(root):
    newest = loops.newest_checkpoint(root)
    return 0 if newest is None else int(newest.name.removeprefix("checkpoint-"))


def is_clean(root):
    """Only complete checkpoints exist."""
    for path in root.iterdir():
        loops.verify_checkpoint(path)
    return all(re.fullmatch(r"checkpoint-\d+", path.name) for path in root.iterdir())


# The disk


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", str(path)], check=True)


def mount(*words):
    if shutil.which("mount") is None:
        pytest.skip("there is no mount program")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


@EACH_LOOP
def test_a_full_disk(loop, disk, straight):
    root = disk / "run"

    def fill(step):
        if step == 4:
            with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*No space left on device.*Free disk space"):
        LOOPS[loop](root, fill)
    assert newest_step(root) == 3 and is_clean(root)
    (disk / "other").unlink()
    LOOPS[loop](root)
    assert result_of(root) == straight[loop]


@EACH_LOOP
def test_a_limit_on_the_size_of_files(loop, tmp_path, straight):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*File too large"):
            LOOPS[loop](tmp_path, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_step(tmp_path) == 3 and is_clean(tmp_path)
    LOOPS[loop](tmp_path)
    assert result_of(tmp_path) == straight[loop]


@EACH_LOOP
def test_a_disk_that_turns_read_only(loop, disk, straight):
    root = disk / "run"
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*Read-only file system"):
        LOOPS[loop](root, lambda step: step == 4 and mount("-o", "remount,ro", str(disk)))
    assert newest_step(root) == 3
    mount("-o", "remount,rw", str(disk))
    LOOPS[loop](root)
    assert result_of(root) == straight[loop] and is_clean(root)


@EACH_LOOP
def test_a_directory_that_may_not_be_written(loop, tmp_path, straight):
    user, root = os.geteuid(), tmp_path / "run"

    def forbid(step):
        if step == 4:
            root.chmod(0o555)
            if user == 0:  # who may do anything
                os.seteuid(65534)

    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*Permission denied"):
            LOOPS[loop](root, forbid)
    finally:
        os.seteuid(user)
        root.chmod(0o755)
    assert newest_step(root) == 3 and is_clean(root)
    LOOPS[loop](root)
    assert result_of(root) == straight[loop]


@EACH_LOOP
def test_the_directory_of_the_run_is_a_file(loop, tmp_path):
    root, reached = tmp_path / "run", []
    root.write_text("mine")
    with pytest.raises(FtsError, match=f"{root}.*(is a file|File exists|Not a directory)"):
        LOOPS[loop](root, reached.append)
    assert loop == "fit" or not reached
    assert root.read_text() == "mine"


@EACH_LOOP
def test_the_directory_of_the_run_is_deleted(loop, tmp_path, straight):
    root = tmp_path / "run"
    LOOPS[loop](root, lambda step: step == 4 and shutil.rmtree(root))
    assert result_of(root) == straight[loop] and is_clean(root)


# Checkpoints that are corrupted afterwards


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    root = tmp_path_factory.mktemp("completed") / "run"
    run_trainer(root)
    return root


FILES = [
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "state.json",
    "trainer_state.json",
    "training_args.json",
]


def test_these_are_the_files_of_a_checkpoint(completed):
    assert sorted(path.name for path in (completed / f"checkpoint-{LAST_STEP}").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=8)
@given(data=st.data())
def test_a_corrupt_file_is_named_and_the_previous_checkpoint_used(name, data, completed):
    last = completed / f"checkpoint-{LAST_STEP}"
    content = (last / name).read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1), label="offset")
    corrupted = {
        "missing": None,
        "truncated": content[:offset],
        "flipped": content[:offset] + bytes([content[offset] ^ 1 << data.draw(st.integers(0, 7))]) + content[offset + 1 :],
        "longer": content + b"\0",
    }[data.draw(st.sampled_from(["missing", "truncated", "flipped", "longer"]), label="corruption")]
    harmless = name == "manifest.json" and corrupted is not None and _same_json(content, corrupted)
    try:
        (last / name).unlink() if corrupted is None else (last / name).write_bytes(corrupted)
        if not harmless:
            with pytest.raises(CheckpointError, match=re.escape(name) if name != "manifest.json" else str(last)):
                loops.verify_checkpoint(last)
            assert loops.newest_checkpoint(completed) == completed / "checkpoint-9"
    finally:
        (last / name).write_bytes(content)


def _same_json(one, other):
    import json

    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("corruption", ["missing", "truncated", "flipped"])
def test_a_run_resumes_from_the_checkpoint_before_a_corrupt_one(name, corruption, completed, straight, tmp_path, caplog):
    root = tmp_path / "run"
    shutil.copytree(completed, root)
    path = root / f"checkpoint-{LAST_STEP}" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if corruption == "missing":
        path.unlink()
    else:
        content[middle] ^= 1
        path.write_bytes(content if corruption == "flipped" else content[:middle])
    with pytest.raises(FtsError, match=re.escape(str(root))):
        make_trainer(root, train_dataset=Examples(), **SETTINGS).train(resume_from_checkpoint=path.parent)
    seen = []
    run_trainer(root, seen.append)
    assert seen == [10, 11, 12]
    assert f"{path.parent} is skipped (corrupt)" in caplog.text
    assert name in caplog.text or name == "manifest.json"  # what is flipped there may be the checksum of another file
    assert result_of(root) == straight["Trainer"]


# The data


def raises():
    raise KeyError("the text is missing")


def notes(error):
    return "\n".join(getattr(error, "__notes__", []))


@EACH_LOOP
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_raises(loop, workers, tmp_path, straight):
    with pytest.raises(KeyError, match="the text is missing") as caught:
        LOOPS[loop](tmp_path, data=Examples(raises), workers=workers)
    assert re.search(
        r"(After step \d+, before|In step \d+:) epoch 0, batch \d .*examples .*\b7\b.* of the data", notes(caught.value)
    )
    assert is_clean(tmp_path)
    LOOPS[loop](tmp_path)
    assert result_of(tmp_path) == straight[loop]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def exits():
    os._exit(3)


@EACH_LOOP
@pytest.mark.parametrize(("fault", "how"), [(killed, "killed by (signal: Killed|SIGKILL)"), (exits, "exit code 3")])
def test_a_worker_that_ends(loop, fault, how, tmp_path, straight):
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        LOOPS[loop](tmp_path, data=Examples(fault), workers=2)
    assert re.search(how, f"{caught.value} {caught.value.__cause__}")
    # torch reports the end of a child by a signal, at any point of the program
    assert re.search(r"(After step \d+, before|In step \d+:) epoch 0, batch \d", notes(caught.value))
    assert is_clean(tmp_path)
    LOOPS[loop](tmp_path, workers=2)
    assert result_of(tmp_path) == straight[loop]


def test_a_collator_that_raises(tmp_path, straight):
    bad = make_examples(22)[7]["labels"]

    def collate(examples):
        if any(one["labels"] == bad for one in examples):
            raise ValueError("cannot stack")
        return get_data_collator(None)(examples)

    with pytest.raises(ValueError, match="cannot stack") as caught:
        run_trainer(tmp_path, data_collator=collate)
    assert re.search(r"before epoch 0, batch \d .*examples .*\b7\b", notes(caught.value))
    run_trainer(tmp_path)
    assert result_of(tmp_path) == straight["Trainer"]


# The user's functions


class Failing(Trainer):
    """Its loss raises in the fifth step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step == 4:
            raise ZeroDivisionError("no examples")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class FailingModel(Regression):
    """Its forward pass raises in the fifth step."""

    calls = 0

    def forward(self, x, labels=None):
        self.calls += 1
        if self.calls == 5:
            raise ZeroDivisionError("no examples")
        return super().forward(x, labels)


def failing_loss(root):
    torch.manual_seed(0)
    Failing(Regression(), arguments(root, **SETTINGS), train_dataset=Examples()).train()


def failing_model(root):
    torch.manual_seed(0)
    make_trainer(root, FailingModel(), train_dataset=Examples(), **SETTINGS).train()


@pytest.mark.parametrize("fail", [failing_loss, failing_model])
def test_a_loss_or_model_that_raises(fail, tmp_path, straight):
    with pytest.raises(ZeroDivisionError, match="no examples") as caught:
        fail(tmp_path)
    reported = notes(caught.value)
    assert re.search(r"In step 5: epoch 0, batch 4 .*examples \d+, \d+, \d+, \d+ of the data", reported)
    assert "A checkpoint of step 4 was written" in reported and newest_step(tmp_path) == 4
    run_trainer(tmp_path)
    assert result_of(tmp_path) == straight["Trainer"]


def test_a_callback_that_raises(tmp_path, straight):
    text = r"ActCallback\.on_step_end failed at step 4: KeyError: 'the text is missing'"
    with pytest.raises(CallbackError, match=text) as caught:
        run_trainer(tmp_path, lambda step: step == 4 and raises())
    assert isinstance(caught.value, KeyError) and isinstance(caught.value.__cause__, KeyError)
    assert "A checkpoint of step 4 was written: train(resume_from_checkpoint=" in notes(caught.value)
    run_trainer(tmp_path)
    assert result_of(tmp_path) == straight["Trainer"]


def test_metrics_that_raise(tmp_path, straight):
    def metrics(prediction):
        raise IndexError("no class 7")

    with pytest.raises(IndexError, match="no class 7") as caught:
        run_trainer(tmp_path, compute_metrics=metrics, eval_strategy="steps", eval_steps=4)
    assert "fter step 4" in notes(caught.value)
    assert "A checkpoint of step 4 was written" in notes(caught.value)
    run_trainer(tmp_path)
    assert result_of(tmp_path) == straight["Trainer"]


# Memory

HUNGRY = """
import pathlib, resource, sys
import torch
from tests.reliability.small_runs import SETTINGS, Examples
from tests.trainer.helpers import Regression, make_trainer

class Hungry(Regression):
    updates = 0
    def forward(self, x, labels=None):
        self.updates += 1
        if self.updates > 4:  # 256 MiB a row
            torch.empty(len(x), 2**26)
        return super().forward(x, labels)

torch.manual_seed(0)
settings = SETTINGS | {"auto_find_batch_size": sys.argv[2] == "find"}
trainer = make_trainer(pathlib.Path(sys.argv[1]), Hungry(), train_dataset=Examples(), **settings)
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 800 * 2**20, -1))
trainer.train()
print(trainer.state.global_step, trainer.state.train_batch_size)
"""


def hungry(root, how):
    if not Path("/proc/self/statm").is_file():
        pytest.skip("the size of a process is not known on this system")
    command = [sys.executable, "-c", HUNGRY, str(root), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_out_of_memory(tmp_path, straight):
    done = hungry(tmp_path, "fail")
    assert done.returncode == 1
    assert re.search(r"(MemoryError|can't allocate memory|not enough memory)", done.stderr)
    assert re.search(r"In step 5: epoch 0, batch 4 .*examples", done.stderr)
    assert "A checkpoint of step 4 was written" in done.stderr
    run_trainer(tmp_path)
    assert result_of(tmp_path) == straight["Trainer"]


def test_out_of_memory_with_a_smaller_batch_that_fits(tmp_path):
    done = hungry(tmp_path, "find")
    assert done.returncode == 0, done.stderr
    assert "A batch of 4 examples does not fit into memory: trying again from the start with 2" in done.stderr
    assert done.stdout.split()[-2:] == ["22", "2"]
    assert newest_step(tmp_path) == 22


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="No valid checkpoint found in output directory"):
        make_trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=True)
