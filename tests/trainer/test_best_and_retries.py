"""The best weights are those that were evaluated; a retry with a smaller batch begins where the first try did."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fts import transforms as tx
from fts.state import TrainState
from fts.trainer import TrainerCallback, TrainerState
from fts.trainer.checkpoints.train_state import load_best_model
from fts.trainer.evaluation.best_model import update_best_metric
from fts.trainer.optimization.transform import make_transform
from tests.trainer.helpers import Linear, Regression, arguments, losses, make_trainer

BEST = {
    "num_train_epochs": 4,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "save_total_limit": 1,
}


def test_the_best_of_a_schedule_free_run_is_what_was_evaluated(tmp_path):
    pytest.importorskip("schedulefree")
    trainer = make_trainer(tmp_path, Regression(dropout=0.0), optim="schedule_free_adamw", **BEST)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("first", [math.nan, 1.0])
@pytest.mark.parametrize("greater", [True, False])
def test_an_evaluation_that_is_nan_is_never_the_best(tmp_path, first, greater):
    scores = iter([first, 0.5, math.nan, 0.5])
    judged = {
        "metric_for_best_model": "score",
        "greater_is_better": greater,
        "compute_metrics": lambda _: {"score": next(scores)},
    }
    trainer = make_trainer(tmp_path, **(BEST | judged))
    trainer.train()
    best = 1 if greater and first == 1.0 else 2
    assert (trainer.state.best_metric, trainer.state.best_global_step) == ((1.0, 6) if best == 1 else (0.5, 12))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{6 * best}", "checkpoint-24"}


def test_a_resumed_run_forgets_a_best_that_is_nan():
    trainer_state = TrainerState(best_metric=math.nan, best_global_step=3, global_step=6)  # as transformers' Trainer writes it
    assert update_best_metric(
        arguments("unused", metric_for_best_model="loss", save_strategy="steps"), trainer_state, {"eval_loss": 2.0}
    )
    assert (trainer_state.best_metric, trainer_state.best_global_step) == (2.0, 6)


def best_first(tmp_path, **changes):
    scores = iter([1.0, 0.4, 0.5, 0.6])
    judged = {"metric_for_best_model": "score", "greater_is_better": True, "compute_metrics": lambda _: {"score": next(scores)}}
    return make_trainer(tmp_path, **(BEST | judged | changes))


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_run_that_was_moved_keeps_its_best_checkpoint_and_loads_it(move, tmp_path, caplog):
    begun = best_first(tmp_path / "one", num_train_epochs=2)
    begun.train()
    move(tmp_path / "one", tmp_path / "two")
    best = load_file(tmp_path / "two" / "checkpoint-6" / "model.safetensors")
    resumed = best_first(tmp_path / "two", num_train_epochs=4, compute_metrics=lambda _: {"score": 0.5})
    resumed.train(resume_from_checkpoint=True)
    assert f"its best checkpoint, {tmp_path / 'one' / 'checkpoint-6'}, is now {tmp_path / 'two' / 'checkpoint-6'}" in caplog.text
    assert resumed.state.best_model_checkpoint == str(tmp_path / "two" / "checkpoint-6")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"checkpoint-6", "checkpoint-24"}
    assert all(torch.equal(tensor, best[name]) for name, tensor in resumed.model.state_dict().items())


def test_another_runs_checkpoint_of_the_same_name_is_not_the_best(tmp_path):
    best_first(tmp_path / "one", num_train_epochs=2).train()
    go_on = {"compute_metrics": lambda _: {"score": 0.5}, "save_total_limit": None}
    elsewhere = best_first(tmp_path / "two", num_train_epochs=3, **go_on)
    elsewhere.train(resume_from_checkpoint=tmp_path / "one" / "checkpoint-12")
    make_trainer(tmp_path / "two", save_strategy="steps", save_steps=6, max_steps=6).train()  # not the best one
    resumed = best_first(tmp_path / "two", num_train_epochs=4, **go_on)
    resumed.train(resume_from_checkpoint=tmp_path / "two" / "checkpoint-18")
    assert resumed.state.best_model_checkpoint == str(tmp_path / "one" / "checkpoint-6")


def test_a_best_checkpoint_that_is_gone_is_reported(tmp_path, caplog):
    best_first(tmp_path, num_train_epochs=2).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = best_first(tmp_path, num_train_epochs=3, compute_metrics=lambda _: {"score": 0.5})
    resumed.train(resume_from_checkpoint=True)
    assert f"The best checkpoint, {tmp_path / 'checkpoint-6'}, does not exist any more" in caplog.text
    assert resumed.state.best_model_checkpoint is None


@pytest.mark.parametrize(
    ("scores", "loaded", "text"),
    [
        ([0.5, 0.6, 0.7, 0.8], None, "(eval_score=0.5) was at step 2, of which there is no checkpoint: the last weights stay"),
        ([0.5, 0.4, 0.1, 0.2], 4, "(eval_score=0.1) was at step 6, of which there is no checkpoint: those of "),
        ([math.nan] * 4, None, "No evaluation had a finite eval_score: the last weights stay."),
        ([0.5, 0.1, 0.2, 0.3], 4, None),
    ],
)
def test_a_best_evaluation_without_a_checkpoint_is_reported(scores, loaded, text, tmp_path, caplog):
    values = iter(scores)
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    options |= {
        "greater_is_better": False,
        "metric_for_best_model": "score",
        "compute_metrics": lambda _: {"score": next(values)},
    }
    trainer = make_trainer(tmp_path, **(BEST | options))
    trainer.train()
    path = None if loaded is None else str(tmp_path / f"checkpoint-{loaded}")
    assert trainer.state.best_model_checkpoint == path
    warned = [record.message for record in caplog.records if record.name == "fts.trainer.evaluation.best_model"]
    assert len(warned) == (text is not None)
    assert text is None or text in warned[0]
    if loaded is not None:
        saved = load_file(tmp_path / f"checkpoint-{loaded}" / "model.safetensors")
        assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("alone", [True, False])
def test_the_best_checkpoint_may_have_more_or_less_than_this_run_saves(alone, tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_adamw", "metric_for_best_model": "score", "greater_is_better": True}
    scores = iter([1.0, 0.5, 0.4])
    options |= {"compute_metrics": lambda _: {"score": next(scores)}, "save_total_limit": None}
    begun = make_trainer(tmp_path, Regression(dropout=0.0), **(BEST | options | {"num_train_epochs": 2}))
    begun.args.save_only_model = alone
    begun.train()
    best = {name: tensor.clone() for name, tensor in begun.model.state_dict().items()}
    trainer_state = begun.state
    resumed = make_trainer(tmp_path, Regression(dropout=0.0), **(BEST | options | {"save_only_model": not alone}))
    state = TrainState.create(
        resumed.model, (transform := make_transform(resumed.args, tx.constant_schedule(0.1), resumed.model, total_steps=9))
    )
    load_best_model(resumed.model, trainer_state.best_model_checkpoint, state, transform)
    assert all(torch.equal(tensor, best[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_the_best_adapters_are_loaded_from_checkpoints_of_the_model_alone(kind, tmp_path):
    peft = pytest.importorskip("peft")
    from tests.trainer.parity.models import llama, texts

    torch.manual_seed(0)
    configs = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    examples = [dict(row, labels=row["input_ids"]) for row in texts()]
    model = peft.get_peft_model(llama(), configs[kind]())
    options = {"learning_rate": 0.3, "save_only_model": True, "train_dataset": examples, "eval_dataset": examples[:6]}
    trainer = make_trainer(tmp_path, model, **(BEST | options))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


class Full(TrainerCallback):
    """Memory does not suffice for batches of 8 at the third update."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.train_batch_size == 8 and state.global_step == 3:
            raise torch.OutOfMemoryError("full")


def with_schedule(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


@pytest.mark.parametrize("own", [False, True])
def test_a_retry_equals_a_run_of_that_size(own, tmp_path):
    def trainer(size, **options):
        torch.manual_seed(0)
        model = Regression()
        if own:
            options["optimizers"] = with_schedule(model)
        return make_trainer(tmp_path / str(size), model, per_device_train_batch_size=size, logging_steps=1, **options)

    found = trainer(8, auto_find_batch_size=True, callbacks=[Full()])
    found.train()
    fresh = trainer(4)
    fresh.train()
    assert losses(found) == losses(fresh)
    assert found.state.train_batch_size == 4
    assert found.args.per_device_train_batch_size == 8


def test_a_resumed_run_keeps_the_size_that_was_found(tmp_path):
    class Stop(Full):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control)
            control.should_training_stop = control.should_save = state.global_step == 4

    options = {"per_device_train_batch_size": 8, "auto_find_batch_size": True, "max_steps": 6}
    make_trainer(tmp_path, Linear(), callbacks=[Stop()], **options).train()
    resumed = make_trainer(tmp_path, Linear(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert resumed.state.train_batch_size == 4
