import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from fts.errors import ArgumentError, BatchError, DataError, LossError
from fts.trainer import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from tests.trainer.helpers import Linear, Regression, losses, make_examples, make_trainer

EPOCH = 6  # steps: 22 examples in batches of 4


def test_training_learns_and_logs(tmp_path):
    trainer = make_trainer(tmp_path, Linear(), logging_steps=2, num_train_epochs=10, learning_rate=0.1)
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == 10 * EPOCH
    assert losses(trainer)[-1] < 0.3 * losses(trainer)[0]
    first, last = trainer.state.log_history[0], trainer.state.log_history[-1]
    assert first.keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert (first["step"], first["epoch"]) == (2, pytest.approx(2 / EPOCH))
    speed = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert last.keys() == speed | {"total_flos", "train_loss", "epoch", "step"}
    assert last["train_loss"] == output.training_loss == pytest.approx(sum(losses(trainer)) / len(losses(trainer)))
    assert output.metrics["train_loss"] == output.training_loss
    assert trainer.state.epoch == 10.0


def test_the_logged_rate_is_the_one_that_the_step_used(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=1, max_steps=4, lr_scheduler_type="linear")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_the_model_holds_the_weights_at_every_step_and_its_modes_come_back(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append((model.training, model.head.weight.detach().clone()))

    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[Watch])
    trainer.model.eval()
    trainer.train()
    assert [training for training, _ in seen] == [True] * 3
    assert not trainer.model.training
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[-1][1], trainer.model.head.weight)


def test_a_user_rides_along_with_tuples_objects_and_loss_functions(tmp_path):
    class Tuple(Regression):
        def forward(self, x, labels=None):
            output = super().forward(x, labels)
            return (output["loss"], output["logits"]) if labels is not None else (output["logits"],)

    class Headless(Regression):
        def forward(self, x):
            return super().forward(x)["logits"]

    def mean_squares(outputs, labels, num_items_in_batch=None):
        return (outputs - labels).square().sum() / num_items_in_batch

    found = []
    for kind, options in ((Regression, {}), (Tuple, {}), (Headless, {"compute_loss_func": mean_squares})):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, kind(), max_steps=8, logging_steps=1, **options)
        trainer.train()
        prediction = trainer.predict(make_examples(10, seed=1))
        found.append((losses(trainer), prediction.predictions.tolist(), prediction.metrics["test_loss"]))
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-5)
        assert other[1] == pytest.approx(found[0][1], rel=1e-4)
        assert other[2] == pytest.approx(found[0][2], rel=1e-5)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path, Linear(), 24, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, logging_steps=1
        )
        trainer.train()
        results.append((losses(trainer), trainer.state.epoch))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == results[1][1] == 3.0


def test_the_order_of_the_data_is_that_of_the_seed(tmp_path):
    seen = []

    class Watching(Linear):
        def forward(self, x, labels=None):
            seen.extend(labels.tolist())
            return super().forward(x, labels)

    data = [{"x": torch.zeros(4), "labels": float(i)} for i in range(10)]
    make_trainer(tmp_path, Watching(), train_dataset=data, num_train_epochs=2, data_seed=5).train()
    expected = [torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch)).tolist() for epoch in (0, 1)]
    assert seen == expected[0] + expected[1]


def test_iterable_data_trains_for_max_steps(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_examples(10))

    trainer = make_trainer(tmp_path, train_dataset=Stream(), max_steps=7)
    assert trainer.train().global_step == 7
    with pytest.raises(ArgumentError, match="max_steps"):
        make_trainer(tmp_path, train_dataset=Stream()).train()


def test_model_init_starts_anew(tmp_path):
    trainer = make_trainer(tmp_path, model_init=Regression, max_steps=3, logging_steps=1)
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer) == first


def test_compiled_step_or_its_fallback_keeps_the_model_up_to_date(tmp_path, recwarn):
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, Linear(), 24, max_steps=6, logging_steps=1, torch_compile=True, eval_strategy="steps", eval_steps=3
    )
    trainer.train()
    torch.manual_seed(0)
    plain = make_trainer(tmp_path, Linear(), 24, max_steps=6, logging_steps=1, eval_strategy="steps", eval_steps=3)
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    evaluated = [[entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (trainer, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


def test_a_transform_without_a_fast_path_still_updates_the_model(tmp_path, monkeypatch):
    from fts.trainer.optimization import optimizer

    original = optimizer.make_transform
    monkeypatch.setattr(optimizer, "make_transform", lambda *args, **kw: original(*args, **kw)._replace(apply=None))
    slow = make_trainer(tmp_path, max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2)
    slow.train()
    monkeypatch.undo()
    fast = make_trainer(tmp_path, max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2)
    fast.train()
    for name, tensor in fast.model.state_dict().items():
        torch.testing.assert_close(slow.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


# Evaluation of the best, early stopping


def test_best_model_is_loaded_at_the_end_and_never_deleted(tmp_path):
    values = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        compute_metrics=lambda prediction: {"score": next(values)},
    )
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 2 * EPOCH)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * EPOCH}")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-30"]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_early_stopping_stops_at_once(tmp_path):
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=5,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="score",
        greater_is_better=False,
        compute_metrics=lambda prediction: {"score": next(values)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    assert trainer.train().global_step == 9


def test_early_stopping_stops_at_the_end_of_an_epoch(tmp_path):
    values = iter([1.0, 2.0, 3.0])
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=5,
        eval_strategy="epoch",
        metric_for_best_model="score",
        greater_is_better=False,
        compute_metrics=lambda prediction: {"score": next(values)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    assert trainer.train().global_step == 2 * EPOCH


def test_workers_fetch_the_same_batches(tmp_path):
    found = []
    for workers in (0, 2):
        trainer = make_trainer(tmp_path, Linear(), max_steps=8, logging_steps=1, dataloader_num_workers=workers)
        trainer.train()
        found.append((losses(trainer), trainer.predict(make_examples(6)).predictions.tolist()))
    assert found[0] == found[1]


def test_a_dataset_may_give_batches(tmp_path):
    class Columns(Dataset):
        x, labels = (
            torch.stack([row["x"] for row in make_examples(22)]),
            torch.tensor([row["labels"] for row in make_examples(22)]),
        )

        def __len__(self):
            return 22

        def __getitems__(self, indices):
            return {"x": self.x[indices], "labels": self.labels[indices], "extra": self.x[indices]}

    found = []
    for options in ({}, {"train_dataset": Columns(), "data_collator": lambda batch: batch}):
        trainer = make_trainer(tmp_path, Linear(), max_steps=8, logging_steps=1, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_early_stopping_needs_a_metric(tmp_path):
    with pytest.raises(ArgumentError, match="metric_for_best_model"):
        make_trainer(tmp_path, callbacks=[EarlyStoppingCallback()]).train()


def test_save_best_saves_when_it_is_best(tmp_path):
    values = iter([1.0, 2.0, 0.5])
    make_trainer(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="best",
        metric_for_best_model="eval_score",
        greater_is_better=False,
        compute_metrics=lambda prediction: {"score": next(values)},
    ).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-6"]


# Errors before training


class Unmatched(Dataset):
    def __init__(self):
        self.column_names = ["text", "stars"]

    def remove_columns(self, names):
        return self

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"text": "good", "stars": 5}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_dataset": None}, ArgumentError, "needs a training set"),
        ({"train_dataset": []}, DataError, "The training set .* is empty"),
        ({"train_dataset": make_examples(3), "dataloader_drop_last": True}, DataError, "has 3 examples, fewer than a batch of 4"),
        ({"train_dataset": [{"x": torch.zeros(4)}]}, DataError, "no labels: a batch has x, the model's labels are called labels"),
        (
            {"train_dataset": Unmatched()},
            DataError,
            "none of the training set's columns: they are text, stars; it takes x, labels",
        ),
        (
            {"train_dataset": [{"text": "good", "stars": 5}]},
            DataError,
            "none of the training set's columns: they are text, stars",
        ),
        (
            {"train_dataset": [{"x": torch.zeros(4), "labels": 1.0, "stars": 5}], "remove_unused_columns": False},
            DataError,
            "Regression.forward does not take stars",
        ),
        ({"data_collator": list, "remove_unused_columns": False}, DataError, "The data_collator made a list of the training set"),
        ({"train_dataset": [(1, 2)]}, BatchError, "is a tuple; the default collator needs dictionaries"),
        ({"eval_strategy": "epoch", "eval_dataset": None}, ArgumentError, "eval_strategy='epoch' needs data to evaluate"),
        ({"optimizers": ("adam", None)}, ArgumentError, "the optimizer is a str"),
    ],
)
def test_errors_before_training(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **options).train()


def test_errors_about_the_model(tmp_path):
    with pytest.raises(ArgumentError, match="either model or model_init; neither"):
        Trainer(args=TrainingArguments(tmp_path))
    with pytest.raises(ArgumentError, match=r"must be a torch.nn.Module, not str"):
        Trainer("bert-base")
    with pytest.raises(ArgumentError, match=r"must be fts\.TrainingArguments, not builtins\.dict"):
        Trainer(Regression(), {})

    class Lossless(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x, labels):
            return {"logits": x @ self.w}

    with pytest.raises(LossError, match="without a loss"):
        make_trainer(tmp_path, Lossless()).train()


def test_the_state_file_is_hugging_faces(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=1)
    trainer.train()
    trainer.save_state()
    document = json.loads((tmp_path / "trainer_state.json").read_text())
    theirs = pytest.importorskip("transformers.trainer_callback").TrainerState
    assert {field.name for field in dataclasses.fields(theirs)} == document.keys()
    assert theirs.load_from_json(str(tmp_path / "trainer_state.json")).global_step == 2
    assert TrainerState.load_from_json(tmp_path / "trainer_state.json") == trainer.state


def test_bf16_computes_in_bfloat16(tmp_path):
    seen = []

    class Watching(Regression):
        def forward(self, x, labels=None):
            seen.append(self.hidden(x).dtype)
            return super().forward(x, labels)

    trainer = make_trainer(tmp_path, Watching(), max_steps=1, bf16=True)
    trainer.train()
    assert seen == [torch.bfloat16]
    assert trainer.model.hidden.weight.dtype == torch.float32
    assert trainer.predict(make_examples(3)).predictions.dtype == "float32"
    assert math.isfinite(trainer.evaluate()["eval_loss"])
