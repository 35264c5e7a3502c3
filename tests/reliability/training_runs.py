"""The runs that `kills` kills: a small BERT with dropout, shuffled data, accumulation, clipping, AdamW and a schedule.

Each is a function `(directory, report) -> (module, metrics)` that resumes from the directory. It reports "began STEP" where it
resumes and "saved STEP" when a checkpoint is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertForSequenceClassification  # at once, since an attempt is short

import fts
from fts import loops, steps, transforms as tx
from fts.trainer import Trainer, TrainerCallback, TrainingArguments

Report: TypeAlias = Callable[[str], None]

NUM_EXAMPLES, EPOCHS, BATCH, ACCUMULATE = 80, 6, 4, 2
TOTAL = EPOCHS * NUM_EXAMPLES // (BATCH * ACCUMULATE)


def model() -> Any:
    """A BERT classifier with dropout; every call returns the same one."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 600, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


class ReportCallback(TrainerCallback):
    """Reports where a run begins and what it has saved."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(f"began {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(f"saved {state.global_step}")


def with_trainer(root: Path, report: Report, **changes: Any) -> tuple[Any, Any]:
    """`fts.Trainer`, which evaluates, keeps the best checkpoint and rotates the others."""
    settings: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 2,
        "save_total_limit": 2,
        "metric_for_best_model": "loss",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "log_level": "error",
    }
    args = TrainingArguments(str(root), **(settings | changes))
    trainer = Trainer(
        model(), args, train_dataset=sentences(NUM_EXAMPLES), eval_dataset=sentences(8, 1), callbacks=[ReportCallback(report)]
    )
    trainer.train(resume_from_checkpoint=loops.newest_checkpoint(root) is not None)
    metrics = [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
    ]
    return trainer.model, metrics


def _core() -> tuple[Any, Any, Any, Any]:
    net = model().train()
    rate = tx.cosine_schedule(3e-3, warmup_steps=5, total_steps=TOTAL)
    optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(rate, weight_decay=0.01))
    step = steps.train_step(steps.module_loss(net), optimizer)
    state = fts.TrainState.create(net, optimizer, seed=5)
    data = loops.source(sentences(NUM_EXAMPLES), batch_size=BATCH, shuffle=True, seed=5, micro_batches=ACCUMULATE)
    return net, step, state, data


def _fit(
    net: Any, step: Any, state: Any, data: Any, position: loops.Position, save: Any, report: Report, watch: Any = iter
) -> tuple[Any, Any]:
    report(f"began {int(state.step)}")
    *_, last = watch(loops.fit(step, state, data, epochs=EPOCHS, start=position, due=loops.cadence(save=2), save=save))
    return last.state.apply_to(net), None


def on_the_thread(root: Path, report: Report) -> tuple[Any, Any]:
    """`fts.Trainer` that saves on the training thread."""
    return with_trainer(root, report, async_save=False)


def with_rotation(root: Path, report: Report) -> tuple[Any, Any]:
    """`loops.fit` with an `AsyncCheckpointer` and a checkpoint of each second step, of which two are kept."""
    net, step, state, data = _core()
    newest, position = loops.newest_checkpoint(root), loops.Position()
    if newest is not None:
        state, position = loops.load_checkpoint(newest, like=state)

    def save(state: Any, position: loops.Position) -> Path:
        path = root / f"checkpoint-{int(state.step)}"

        def on_complete() -> None:
            report(f"saved {path.name.removeprefix('checkpoint-')}")
            loops.rotate_checkpoints(root, 2)

        return checkpointer.save(path, state, position, on_complete=on_complete)

    with loops.AsyncCheckpointer() as checkpointer:
        return _fit(net, step, state, data, position, save, report, checkpointer.watch)


def with_replacement(root: Path, report: Report) -> tuple[Any, Any]:
    """`loops.fit` with one checkpoint that is replaced again and again."""
    net, step, state, data = _core()
    position = loops.Position()
    if root.is_dir() and any(path.name in ("last", ".last.replaced") for path in root.iterdir()):
        state, position = loops.load_checkpoint(root / "last", like=state)

    def save(state: Any, position: loops.Position) -> Path:
        path = loops.save_checkpoint(root / "last", state, position)
        report(f"saved {int(state.step)}")
        return path

    return _fit(net, step, state, data, position, save, report)


LOOPS: dict[str, Callable[[Path, Report], tuple[Any, Any]]] = {
    "Trainer": with_trainer,
    "Trainer, async_save=False": on_the_thread,
    "fit, AsyncCheckpointer": with_rotation,
    "fit, one replaced": with_replacement,
}
