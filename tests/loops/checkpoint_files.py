"""Small checkpoints on the disk, and what can happen to them."""

import json
from pathlib import Path

import torch

import fts
from fts import loops, transforms as tx
from fts.loops import Position

WEIGHTS = "model.safetensors"


def state_at(step: int, value: float = 1.0):
    state = fts.TrainState.create({"w": torch.full((64,), value), "b": torch.zeros(3)}, tx.adamw(0.1))
    return state.replace(step=torch.tensor(step))


def save(root: Path, step: int, history: list | None = None, **fields) -> Path:
    """A checkpoint of `fts.loops`; with a history, or other fields of a trainer state, also a `trainer_state.json`."""

    def write(hidden: Path) -> None:
        if history is not None or fields:
            document = {"global_step": step, "log_history": history or [], **fields}
            (hidden / "trainer_state.json").write_text(json.dumps(document))

    return loops.save_checkpoint(root / f"checkpoint-{step}", state_at(step), Position(0, step), write=write)


def save_model(root: Path, step: int) -> Path:
    """As `save_only_model` writes it."""
    return loops.atomic_directory(root / f"checkpoint-{step}", lambda hidden: (hidden / WEIGHTS).write_bytes(b"weights") and None)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def truncate(checkpoint: Path, name: str = WEIGHTS) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[:-1])


def flip_a_bit(checkpoint: Path, name: str = WEIGHTS) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-5] ^= 4
    (checkpoint / name).write_bytes(content)
