"""k steps, and in new objects the rest from the checkpoint, equal the uninterrupted run bit for bit."""

import multiprocessing
import os
import random
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from fts import transforms as tx
from fts.errors import Interrupted
from fts.trainer import EarlyStoppingCallback, TrainerCallback
from fts.trainer.callbacks.state import ExportableState
from tests.trainer.helpers import Linear, Regression, make_examples, make_trainer

NUM_EXAMPLES = 22
SETTINGS = {
    "num_train_epochs": 2,  # of 6 updates
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 12,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "metric_for_best_model": "loss",
    "lr_scheduler_type": "cosine",
}
TIMES = ("runtime", "per_second")


class StopAt(TrainerCallback):
    """Sends the process a signal: a checkpoint that no cadence asked for, and the end."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


class Stepwise(TrainerCallback, ExportableState):
    """A user's own callback with a state, which the log shows."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = [*self.seen, state.global_step * (1 + len(self.seen))][-3:]

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["seen"] = sum(self.seen)

    def state(self):
        return {"args": {}, "attributes": {"seen": self.seen}}


class Noisy(Dataset):
    """Augments with the three generators."""

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        row = make_examples(NUM_EXAMPLES)[index]
        return {**row, "x": row["x"] * random.random() + torch.rand(4) * np.random.rand()}


def noisy_collator(examples):
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in examples]) for name in ("x", "labels")}
    return {**batch, "x": batch["x"] + random.gauss(0, 0.1) * torch.randn(4) * np.random.rand()}


class Stream(IterableDataset):
    """A stream with a state, whose reads are counted."""

    def __init__(self):
        self.at = self.reads = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def __iter__(self):
        data = make_examples(NUM_EXAMPLES)
        while self.at < NUM_EXAMPLES:
            self.at, self.reads = self.at + 1, self.reads + 1
            yield {**data[self.at - 1], "x": data[self.at - 1]["x"] + random.random()}
        self.at = 0


def hugging_face():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(
        [{"x": row["x"].tolist(), "labels": row["labels"]} for row in make_examples(NUM_EXAMPLES)]
    ).to_iterable_dataset(num_shards=3)


def lengths():
    return [{**row, "length": i * 7 % 5} for i, row in enumerate(make_examples(NUM_EXAMPLES))]


def own_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step))}


def averaging(model):
    return {"step": tx.ema_params(tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.01)), 0.9, debias=True)}


def adapted():
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

        def forward(self, x, labels=None):
            logits = self.net(x).squeeze(-1)
            return {"loss": None if labels is None else nn.functional.mse_loss(logits, labels), "logits": logits}

    return peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["net.0"], lora_dropout=0.1))


def best(*more):
    return lambda model: {"callbacks": [EarlyStoppingCallback(9), *(kind() for kind in more)]}


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5}}
GREEDY = {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"patience": 0, "smooth": True, "window_size": 3}}
STREAM = {"num_train_epochs": 3.0, "max_steps": 12}
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}

# name: (arguments, what else the Trainer gets, model)
CASES = {
    "plain": ({}, None, Regression),
    "half an epoch more": ({"num_train_epochs": 1.5, "save_steps": 9}, None, Regression),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, None, Regression),
    "drop_last": ({"dataloader_drop_last": True, "num_train_epochs": 2.4}, None, Regression),
    "in sequence": ({"train_sampling_strategy": "sequential"}, None, Regression),
    "by length": ({"train_sampling_strategy": "group_by_length"}, lambda model: {"train_dataset": lengths()}, Regression),
    "augmented": ({}, lambda model: {"train_dataset": Noisy(), "data_collator": noisy_collator}, Regression),
    "augmented examples": ({}, lambda model: {"train_dataset": Noisy()}, Regression),
    "average": ({}, averaging, Regression),
    "schedule-free": ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 2}, None, Regression),
    "adafactor": ({"optim": "adafactor"}, None, Regression),
    "plateau": (PLATEAU, None, Regression),
    "greedy": (GREEDY, None, Regression),
    "torch optimizer": ({}, own_optimizer, Regression),
    "by epochs": (
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, **PLATEAU},
        None,
        Regression,
    ),
    "callbacks": ({"load_best_model_at_end": True, "save_steps": 3}, best(Stepwise), Regression),
    "best by the metric": ({"save_strategy": "best", "save_steps": 500}, best(), Regression),
    "adapters": ({}, None, adapted),
    "stream": (STREAM, lambda model: {"train_dataset": Stream()}, Regression),
    "stream, accumulated": (
        {**STREAM, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        lambda model: {"train_dataset": Stream()},
        Regression,
    ),
    "datasets": (STREAM, lambda model: {"train_dataset": hugging_face()}, Regression),
    "a batch at a time": ({"per_device_train_batch_size": 1, "max_steps": 12}, None, Linear),
    "neftune and smoothing of logs": ({"logging_steps": 5, "logging_first_step": True, "max_grad_norm": 0.0}, None, Regression),
}


def made(folder, case, *callbacks, **changes):
    settings, parts, kind = CASES[case]
    torch.manual_seed(0)
    model = kind()
    own = {} if parts is None else parts(model)
    torch.manual_seed(99), np.random.seed(98), random.seed(97)  # a new process has other generators
    own["callbacks"] = [*own.get("callbacks", []), *callbacks]
    return make_trainer(folder, model, count=NUM_EXAMPLES, **(SETTINGS | settings | changes), **own)


def history(trainer):
    return [{name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in trainer.state.log_history]


def assert_same_run(full, resumed):
    assert history(resumed) == history(full)
    assert full.state.global_step == resumed.state.global_step
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    last = [
        sorted(trainer.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1] for trainer in (full, resumed)
    ]
    assert last[0].name == last[1].name
    files = sorted(path.name for path in last[0].glob("*.safetensors"))
    assert "optimizer.safetensors" in files
    for file in files:
        one, other = load_file(last[0] / file), load_file(last[1] / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    states = [trainer.state.stateful_callbacks | {"TrainerControl": None} for trainer in (full, resumed)]
    assert states[0] == states[1]


def compare(tmp_path, case, stop, *, before=None, after=None):
    full = made(tmp_path / "full", case)
    full.train()
    with pytest.raises(Interrupted):
        made(tmp_path / "parts", case, StopAt(stop), **(before or {})).train()
    resumed = made(tmp_path / "parts", case, **(after or {}))
    resumed.train(resume_from_checkpoint=tmp_path / "parts" / f"checkpoint-{stop}")
    full.output_dir, resumed.output_dir = tmp_path / "full", tmp_path / "parts"
    assert_same_run(full, resumed)
    return full, resumed


@pytest.mark.parametrize("stop", [4, 6])  # in the middle of an epoch; at its end, where an evaluation is due
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"augmented examples"}))
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, case, stop):
    compare(tmp_path, case, stop)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, WORKERS),
        (WORKERS, {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 5}),
    ],
)
def test_the_number_of_workers_may_change(tmp_path, before, after):
    compare(tmp_path, "augmented examples", 7, before=before, after=after)


@pytest.mark.parametrize("stop", [None, 5])
def test_a_run_that_is_over_has_no_workers_also_where_an_error_is_kept(tmp_path, stop):
    before = set(multiprocessing.active_children())
    trainer = made(tmp_path, "augmented examples", *[StopAt(stop)] if stop else [], eval_strategy="no", **WORKERS)
    with pytest.raises(Interrupted) if stop else nullcontext() as _kept:
        trainer.train()
    assert set(multiprocessing.active_children()) <= before


def test_a_stream_that_a_worker_reads_ahead_resumes(tmp_path, monkeypatch):
    settings, *rest = CASES["stream, accumulated"]
    monkeypatch.setitem(CASES, "one", ({**settings, "dataloader_num_workers": 1}, *rest))
    compare(tmp_path, "one", 8)


def test_a_run_in_two_workers_of_datasets_resumes(tmp_path, monkeypatch):
    settings, *rest = CASES["datasets"]
    monkeypatch.setitem(CASES, "two", ({**settings, **WORKERS}, *rest))
    compare(tmp_path, "two", 5)


def test_a_resumed_stream_reads_nothing_again(tmp_path):
    with pytest.raises(Interrupted):
        made(tmp_path, "stream", StopAt(5), eval_strategy="no").train()
    resumed = made(tmp_path, "stream", max_steps=6, eval_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.train_dataset.reads == NUM_EXAMPLES - 5 * 4
    again = made(tmp_path, "stream", max_steps=6, eval_strategy="no", ignore_data_skip=True)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-5")
    assert again.train_dataset.reads == 4


def test_a_compiled_step_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "compiled", ({"torch_compile": True, "torch_compile_backend": "eager"}, None, Linear))
    compare(tmp_path, "compiled", 5)


def test_several_interruptions_at_any_step(tmp_path):
    full = made(tmp_path / "full", "callbacks")
    full.train()
    for stop in range(1, 12):
        with pytest.raises(Interrupted):
            made(tmp_path / "parts", "callbacks", StopAt(stop)).train(resume_from_checkpoint=stop > 1)
    resumed = made(tmp_path / "parts", "callbacks")
    resumed.train(resume_from_checkpoint=True)
    full.output_dir, resumed.output_dir = tmp_path / "full", tmp_path / "parts"
    assert_same_run(full, resumed)


def test_a_run_that_was_stopped_early_stays_so_unless_it_gets_more_patience(tmp_path):
    def trainer(patience):
        settings = {"learning_rate": 0.0, "save_steps": 3, "eval_steps": 3}
        torch.manual_seed(0)
        stopper = EarlyStoppingCallback(patience)
        return make_trainer(
            tmp_path, Regression(dropout=0.0), callbacks=[stopper], **(SETTINGS | settings | {"num_train_epochs": 4})
        )

    first = trainer(2)
    first.train()
    assert 6 <= first.state.global_step < 24
    stopped = first.state.global_step
    again = trainer(2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == stopped
    assert history(again)[: len(history(first))] == history(first)
    more = trainer(3)
    more.train(resume_from_checkpoint=tmp_path / f"checkpoint-{stopped}")
    assert more.state.global_step > stopped
