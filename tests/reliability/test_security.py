"""Somebody else has written the files of a checkpoint, or can read what a run leaves: see SECURITY.md.

Nothing is executed, only errors of fts come out, nothing outside the directory is read as part of it or changed, and no secret
gets into a file or a log.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fts
from fts import cli, loops, transforms as tx
from fts.errors import CheckpointError, FtsError
from fts.loops.checkpoint_list import list_checkpoints
from fts.storage.manifest import write_manifest
from fts.trainer import EarlyStoppingCallback, TrainerState, TrainingArguments
from fts.trainer.callbacks import restore_callbacks
from fts.trainer.checkpoints.argument_changes import load_arguments
from fts.trainer.checkpoints.epoch_layout import load_epoch_layout
from fts.trainer.checkpoints.from_transformers import read_torch_file
from fts.trainer.model.weights import load_weights
from tests.reliability.small_runs import SETTINGS, Examples
from tests.trainer.helpers import Regression, make_trainer

JSON_FILES = ["manifest.json", "progress.json", "state.json", "trainer_state.json", "training_args.json"]
TENSOR_FILES = ["model.safetensors", "optimizer.safetensors"]
OTHERS = [  # what other trainers and libraries read
    "adapter_model.bin",
    "optimizer.bin",
    "optimizer.pt",
    "pytorch_model.bin",
    "rng_state.pth",
    "rng_state_0.pth",
    "scaler.pt",
    "scheduler.bin",
    "scheduler.pt",
    "state.pkl",
    "training_args.bin",
]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "load_best_model_at_end": True}
OPTIONS = SETTINGS | EVALUATED


@pytest.fixture(scope="module", autouse=True)
def hasty():
    """No file has to survive a loss of power, and there are many examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """A run with checkpoints of steps 3 and 6."""
    root = tmp_path_factory.mktemp("completed") / "run"
    trainer(root, max_steps=6).train()
    return root


@pytest.fixture
def root(completed, tmp_path):
    """A copy of it."""
    return shutil.copytree(completed, tmp_path / "run")


def trainer(root, max_steps=8):
    return make_trainer(root, train_dataset=Examples(), callbacks=[EarlyStoppingCallback(9)], max_steps=max_steps, **OPTIONS)


def read_everything(root, checkpoint, *, resume=True):
    """Call every function that reads a checkpoint; errors of fts are what is allowed to come out."""
    state = fts.TrainState.create(Regression(), tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.01)))

    readers = [
        lambda: fts.TrainState.load(checkpoint, like=state),
        lambda: loops.load_checkpoint(checkpoint, like=state),
        lambda: loops.load_extra(checkpoint),
        lambda: loops.verify_checkpoint(checkpoint),
        lambda: loops.newest_checkpoint(root),
        lambda: list_checkpoints(root),
        lambda: cli.main(["checkpoints", str(root)]),
        lambda: cli.main(["checkpoints", "prune", str(root), "--keep", "1", "--dry-run"]),
        lambda: TrainerState.load_from_json(checkpoint / "trainer_state.json"),
        lambda: load_arguments(checkpoint),
        lambda: load_epoch_layout(checkpoint),
        lambda: load_weights(Regression(), checkpoint),
    ]
    if resume:
        readers.append(lambda: trainer(root).train(resume_from_checkpoint=checkpoint))
    for read in readers:
        with contextlib.suppress(FtsError), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read()


# Pickles


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_pickle(bomb):
    return pickle.dumps(bomb)


def as_torch_file(bomb):
    file = io.BytesIO()
    torch.save({"state": bomb, "param_groups": []}, file)
    return file.getvalue()


@pytest.mark.parametrize("content", [as_pickle, as_torch_file])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", [*JSON_FILES, *TENSOR_FILES, *OTHERS])
def test_a_planted_pickle_is_never_run(name, sealed, content, root, tmp_path):
    exploded, checkpoint = tmp_path / "exploded", root / "checkpoint-6"
    (checkpoint / name).write_bytes(content(Bomb(exploded)))
    if sealed and name != "manifest.json":
        write_manifest(checkpoint)
    read_everything(root, checkpoint)
    assert not exploded.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"])
@pytest.mark.parametrize("content", [as_pickle, as_torch_file])
def test_a_pickle_in_a_checkpoint_of_transformers_is_never_run(name, content, root, tmp_path):
    exploded, checkpoint = tmp_path / "exploded", root / "checkpoint-6"
    for file in ("manifest.json", "optimizer.safetensors", "progress.json", "state.json"):
        (checkpoint / file).unlink()
    optimizer = torch.optim.AdamW(Regression().parameters())
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    torch.save({"last_epoch": 6}, checkpoint / "scheduler.pt")
    (checkpoint / name).write_bytes(content(Bomb(exploded)))
    read_everything(root, checkpoint)
    assert not exploded.exists()


def test_the_bomb_works(tmp_path):
    pickle.loads(as_pickle(Bomb(tmp_path / "exploded")))  # noqa: S301
    assert (tmp_path / "exploded").exists()


# Any bytes, any JSON

NUMBERS = st.integers() | st.sampled_from([2**63, -(2**63) - 1, 10**400, True, False]) | st.floats()
LEAVES = st.none() | NUMBERS | st.text(max_size=8) | st.sampled_from(["../../x", "/etc/passwd", "checkpoint-6", "__class__"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)


def places(value, path=()):
    """The paths of all values in a document, itself included."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


@st.composite
def changed(draw, document):
    """The document with one or two of its values replaced or left out."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            return draw(VALUES)
        *above, last = path
        owner = document
        for key in above:
            owner = owner[key]
        if draw(st.booleans()) and isinstance(owner, dict):
            del owner[last]
        else:
            owner[last] = draw(VALUES)
    return document


@contextlib.contextmanager
def unchanged_outside(root):
    """Files next to the run's directory stay unchanged."""
    before = sorted(path for path in root.parent.rglob("*") if root not in path.parents)
    yield
    assert sorted(path for path in root.parent.rglob("*") if root not in path.parents) == before


@pytest.fixture(scope="module")
def played(completed, tmp_path_factory):
    """A copy that examples change, each a bit more."""
    return shutil.copytree(completed, tmp_path_factory.mktemp("played") / "run")


@pytest.mark.parametrize("name", [*JSON_FILES, *TENSOR_FILES])
@given(content=st.binary(max_size=200), full=st.booleans(), data=st.data())
def test_any_bytes_in_a_file(name, content, full, data, completed, played):
    checkpoint = played / "checkpoint-6"
    before = (completed / "checkpoint-6" / name).read_bytes()
    start = data.draw(st.integers(0, len(before)))
    with unchanged_outside(played):
        _restore(completed, played)
        (checkpoint / name).write_bytes(content if full else before[:start] + content + before[start + len(content) :])
        read_everything(played, checkpoint, resume=False)
        if name != "manifest.json":
            write_manifest(checkpoint)
        read_everything(played, checkpoint, resume=data.draw(st.integers(0, 3)) == 0)


@pytest.mark.parametrize("name", JSON_FILES)
@settings(max_examples=2 * settings.default.max_examples)
@given(data=st.data())
def test_any_json_in_a_file_with_the_right_checksum(name, data, completed, played):
    checkpoint = played / "checkpoint-6"
    with unchanged_outside(played):
        _restore(completed, played)
        document = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(data.draw(changed(document), label="document")))
        if name != "manifest.json":
            write_manifest(checkpoint)
        read_everything(played, checkpoint)


def _restore(completed, played):
    for path in played.iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    shutil.copytree(completed / "checkpoint-6", played / "checkpoint-6")


@given(states=st.dictionaries(st.sampled_from(["EarlyStoppingCallback", "TrainerControl", "Other"]), VALUES, max_size=2) | VALUES)
def test_any_states_of_callbacks(states):
    with contextlib.suppress(FtsError):
        restore_callbacks([EarlyStoppingCallback(2)], states, arguments=bool(states))


@given(content=st.binary(max_size=300), at=st.integers(0, 400))
def test_any_bytes_in_an_optimizer_of_torch(content, at, tmp_path_factory):
    file = io.BytesIO()
    torch.save({"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}, file)
    good, path = file.getvalue(), tmp_path_factory.mktemp("file") / "optimizer.pt"
    path.write_bytes(good[:at] + content + good[at + len(content) :])
    with contextlib.suppress(CheckpointError):
        read_torch_file(path)


# Paths that lead outside


@pytest.mark.parametrize("name", [*JSON_FILES, *TENSOR_FILES])
def test_a_link_that_leads_outside_is_no_file_of_a_checkpoint(name, root, tmp_path):
    checkpoint, outside = root / "checkpoint-6", tmp_path / "outside"
    shutil.copy(checkpoint / name, outside)
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leads outside"):
        loops.verify_checkpoint(checkpoint)
    assert loops.newest_checkpoint(root) == root / "checkpoint-3"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "..", "a\0b", "x" * 5000])
def test_a_manifest_names_nothing_outside(name, root):
    checkpoint = root / "checkpoint-6"
    (root / "secret").write_text("x")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "xxh3_128": "0"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        loops.verify_checkpoint(checkpoint)


def test_a_pipe_instead_of_a_file_does_not_hang(root):
    checkpoint = root / "checkpoint-6"
    for name in (*JSON_FILES, *TENSOR_FILES):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)
        with pytest.raises(CheckpointError, match="not a regular file"):
            loops.verify_checkpoint(checkpoint)
        (checkpoint / name).unlink()
        (checkpoint / name).write_bytes(content)
    loops.verify_checkpoint(checkpoint)


@pytest.mark.parametrize("best", ["/etc", "../../..", "nowhere"])
def test_rotation_deletes_nothing_that_a_checkpoint_names(best, root, tmp_path):
    other = tmp_path / "checkpoint-1"
    other.mkdir()
    path = root / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["best_model_checkpoint"] = str(other) if best == "nowhere" else best
    path.write_text(json.dumps(state))
    write_manifest(path.parent)
    with contextlib.suppress(FtsError):
        make_trainer(root, train_dataset=Examples(), save_total_limit=1, **SETTINGS).train(resume_from_checkpoint=True)
    assert other.is_dir()


# Secrets

SECRET = "hf_aVerySecretToken0123456789"


def secretive(root):
    return TrainingArguments(
        str(root),
        hub_token=SECRET,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=4,
        log_level="debug",
        use_cpu=True,
        report_to="none",
        lr_scheduler_kwargs={},
        gradient_checkpointing_kwargs={"hub_token": SECRET, "inner": [{"api_key": SECRET, "password": SECRET}]},
    )


def test_no_secret_gets_into_a_file_or_a_log(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    root = tmp_path / "run"
    with caplog.at_level(logging.DEBUG):
        from fts.trainer import Trainer

        for resume in (None, root / "checkpoint-2"):
            torch.manual_seed(0)
            one = Trainer(Regression(), secretive(root), train_dataset=Examples(), eval_dataset=Examples())
            one.train(resume_from_checkpoint=resume)
        one.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    out, err = capfd.readouterr()
    assert SECRET not in out + err + caplog.text


def test_arguments_show_no_secret(tmp_path):
    args = secretive(tmp_path)
    shown = [repr(args), str(args), str(args.to_dict()), args.to_json_string(), str(args.to_sanitized_dict())]
    assert not [text for text in shown if SECRET in text]
    assert args.hub_token == SECRET and args.to_dict()["hub_token"] == "<HUB_TOKEN>"
