"""Two loops that train the same small model, for tests with faults: the Trainer, and `fit` with an AsyncCheckpointer.

Both have dropout and shuffled data, save every third of 12 updates, resume from the newest complete checkpoint if there is
one, and call `act(step)` after each update, when the saves before are complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import fts
from fts import loops, steps, transforms as tx
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Regression, make_examples, make_trainer

LAST_STEP = 12
SETTINGS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
Act = Callable[[int], object]


class Examples(Dataset[Any]):
    """22 examples; reading the eighth calls `fault`."""

    def __init__(self, fault: Callable[[], object] | None = None) -> None:
        self.examples = make_examples(22)
        self.fault = fault

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        if index == 7 and self.fault is not None:
            self.fault()
        return self.examples[index]


class ActCallback(TrainerCallback):
    """Calls a function after each update; saves before are complete, because it handles `on_save`."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step)


def run_trainer(root: Path, act: Act | None = None, data: Any = None, workers: int = 0, **options: Any) -> None:
    data = Examples() if data is None else data
    callbacks = [] if act is None else [ActCallback(act)]
    settings = SETTINGS | {"dataloader_num_workers": workers} | options
    trainer = make_trainer(root, train_dataset=data, callbacks=callbacks, **settings)
    trainer.train(resume_from_checkpoint=loops.newest_checkpoint(root) is not None)


def run_fit(root: Path, act: Act | None = None, data: Any = None, workers: int = 0) -> None:
    torch.manual_seed(0)
    net, optimizer = Regression().train(), tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.01))
    state, start = fts.TrainState.create(net, optimizer, seed=1), loops.Position()
    newest = loops.newest_checkpoint(root)
    if newest is not None:
        state, start = loops.load_checkpoint(newest, like=state)
    data = Examples() if data is None else data
    source = loops.source(data, batch_size=4, shuffle=True, seed=1, workers=workers)
    step = steps.train_step(steps.module_loss(net), optimizer)
    with loops.AsyncCheckpointer() as checkpointer:

        def save(state: fts.TrainState, position: loops.Position) -> Path:
            return checkpointer.save(root / f"checkpoint-{int(state.step)}", state, position)

        events = loops.fit(step, state, source, epochs=2, start=start, due=loops.cadence(save=3), save=save)
        for event in checkpointer.watch(loops.with_error_context(events, source)):
            if act is not None and isinstance(event, loops.StepEnd):
                checkpointer.wait()
                act(event.counters.step)


LOOPS = {"Trainer": run_trainer, "fit": run_fit}


def result_of(root: Path) -> dict[str, bytes]:
    """The result of a run: weights, optimizer and step, byte for byte."""
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {name: (root / f"checkpoint-{LAST_STEP}" / name).read_bytes() for name in names}
