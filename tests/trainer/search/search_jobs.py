"""Searches that run in separate processes: `python -m tests.trainer.search.search_jobs NAME FOLDER [ARGUMENTS as JSON]`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fts.trainer import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from tests.trainer.helpers import Regression, make_examples

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[3]


class CountsSteps(TrainerCallback):
    """Counts the updates, in a number and in a list."""

    def __init__(self) -> None:
        self.count = 0
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1
        self.steps.append(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history.append({"count": self.count, "listed": len(self.steps), "step": state.global_step})


def make(folder: Any, *callbacks: Any, **settings: Any) -> Trainer:
    """A trainer of a model with dropout and BatchNorm, in shuffled order, that may stop early."""
    defaults: dict[str, Any] = {
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(str(folder), **(defaults | settings))
    stop = [EarlyStoppingCallback(early_stopping_patience=2)] if args.load_best_model_at_end else []
    return Trainer(
        model_init=Regression,
        args=args,
        train_dataset=make_examples(22),
        eval_dataset=make_examples(10, seed=1),
        callbacks=[CountsSteps(), *stop, *callbacks],
    )


def rates(trial: Any) -> dict[str, Any]:
    """A space: the learning rate, as optuna chooses it."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}


def run_result(trainer: Trainer) -> dict[str, Any]:
    """The result of a run: its logs without times, and its weights."""
    logs = [
        {name: value for name, value in log.items() if "per_second" not in name and "runtime" not in name}
        for log in history(trainer)
    ]
    return {"logs": logs, "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()}}


def history(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.state.log_history


def single_run(folder: str, values: dict[str, Any]) -> Any:
    """Train with some arguments."""
    trainer = make(folder, **values)
    trainer.train()
    return run_result(trainer)


class KillAt(TrainerCallback):
    """Ends the process, as the kernel does when memory runs out, at a step of the n-th trial."""

    def __init__(self, trial: int, step: int, signal: int) -> None:
        self.trial, self.step, self.signal = trial, step, signal

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith(f"run-{self.trial}") and state.global_step == self.step:
            os.kill(os.getpid(), self.signal)


def killed(folder: str, values: dict[str, Any]) -> Any:
    """Search; `kill` in the values says in which trial, at which step and by which signal the process ends."""
    import optuna

    kill = [KillAt(*values["kill"])] if "kill" in values else []
    storage: Any = f"sqlite:///{folder}/study.db"
    if values["storage"] == "journal":
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{folder}/study.log"))
    best = make(folder, *kill).hyperparameter_search(
        rates, n_trials=values["n_trials"], backend="optuna", study_name="it", storage=storage, load_if_exists=True
    )
    return best._asdict()


class Large(torch.nn.Module):
    """12 MB of weights, and as much again twice for Adam's moments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 600_000)

    def forward(self, x: Any, labels: Any = None) -> Any:
        logits = self.inner(x).mean(-1)
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def memory(folder: str, values: dict[str, Any]) -> Any:
    """At the end of each trial of a large model: the resident memory in MB, and how many trainers and models there are."""
    import psutil

    usage: list[tuple[float, int, int]] = []
    args = TrainingArguments(
        folder, max_steps=2, save_strategy="steps", save_steps=2, save_total_limit=1, disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model_init=Large, args=args, train_dataset=make_examples(8), eval_dataset=make_examples(4))

    def record(study: Any, trial: Any) -> None:
        alive = [sum(isinstance(thing, kind) for thing in gc.get_objects()) for kind in (Trainer, Large)]
        usage.append((psutil.Process().memory_info().rss / 2**20, *alive))

    trainer.hyperparameter_search(rates, n_trials=values["n_trials"], backend="optuna", callbacks=[record])
    return usage


JOBS = {"single_run": single_run, "killed": killed, "memory": memory}


def start(name: str, folder: Any, **values: Any) -> subprocess.CompletedProcess[str]:
    """Run a job in a separate process; its result is the last line that it prints, as JSON."""
    command = [sys.executable, "-m", "tests.trainer.search.search_jobs", name, str(folder), json.dumps(values)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is returned at once
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    job, folder, values = sys.argv[1:]
    print(json.dumps(JOBS[job](folder, json.loads(values))))
