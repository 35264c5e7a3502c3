"""Runs that transformers' Trainer began and fts resumes, compared with uninterrupted runs of transformers."""

import os
import pickle
import shutil

import pytest
import torch
import transformers

from fts.errors import ArgumentError, CheckpointError
from fts.trainer import EarlyStoppingCallback, Trainer, TrainingArguments
from tests.trainer.helpers import make_examples, make_trainer
from tests.trainer.parity.compare import BASE, assert_same_training
from tests.trainer.parity.models import Plain, bert, masked_bert, sentences, texts

STEPS, SAVED = 12, 6
ARGUMENTS = BASE | {"max_steps": STEPS, "weight_decay": 0.1, "warmup_steps": 2, "save_strategy": "steps", "save_steps": SAVED}


def began(folder, model=None, data=None, *, optimizers=lambda model: (None, None), callbacks=(), **changes):
    """An uninterrupted run of transformers' Trainer, with a checkpoint in its middle."""
    model = bert() if model is None else model
    args = transformers.TrainingArguments(str(folder), **(ARGUMENTS | changes))
    data = sentences() if data is None else data
    trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=optimizers(model), callbacks=list(callbacks))
    trainer.train()
    return trainer


def resume_run(folder, model=None, data=None, *, resume=None, optimizers=lambda model: (None, None), callbacks=(), **changes):
    """fts, from that checkpoint on; the model's own weights must not matter."""
    model = bert() if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    args = TrainingArguments(str(folder), **(ARGUMENTS | {"save_strategy": "no"} | changes))
    data = sentences() if data is None else data
    trainer = Trainer(model, args, train_dataset=data, optimizers=optimizers(model), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=folder / f"checkpoint-{SAVED}" if resume is None else resume)
    return trainer


def report_of(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7, "data_seed": 3},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
        {"optim": "sgd"},
        {"optim": "adagrad"},
        {"optim": "adafactor"},
        {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3},
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_one_that_transformers_trained_through(tmp_path, caplog, changes):
    # the gradient of BERT's key biases is 0 but for rounding, which Adafactor divides by its size
    make = Plain if changes.get("optim") == "adafactor" else bert
    full = began(tmp_path, make(), **changes)
    assert full.state.global_step > SAVED
    resumed = resume_run(tmp_path, make(), **changes)
    assert_same_training(full, resumed)
    said = report_of(caplog)
    assert f"step {SAVED}, {SAVED} entries of the log history" in said
    assert f"Restored: weights ({len(list(make().parameters()))} tensors)" in said
    assert "Restored: the optimizer's state" in said
    assert "Restored: the learning rate schedule" in said
    for lost in ("random generators", "training_args.bin"):
        assert lost in said


def test_tied_weights_come_from_their_one_name(tmp_path):
    data = texts()
    assert_same_training(began(tmp_path, masked_bert(), data), resume_run(tmp_path, masked_bert(), data))


def test_checkpoints_of_adapters_alone(tmp_path, caplog):
    peft = pytest.importorskip("peft")

    def adapted():
        model = bert()
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))

    full = began(tmp_path, adapted())
    model = adapted()
    args = TrainingArguments(str(tmp_path), **(ARGUMENTS | {"save_strategy": "no"}))
    resumed = Trainer(model, args, train_dataset=sentences())
    resumed.train(resume_from_checkpoint=tmp_path / f"checkpoint-{SAVED}")
    assert_same_training(full, resumed)
    assert "the adapters (adapter_model.safetensors)" in report_of(caplog)


def lambda_rule(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def test_a_torch_optimizer_and_its_schedule_go_on(tmp_path, caplog):
    assert_same_training(began(tmp_path, optimizers=lambda_rule), resume_run(tmp_path, optimizers=lambda_rule))
    assert "max_exp_avg_sq" in report_of(caplog)
    assert "the state of LambdaLR" in report_of(caplog)


def test_the_newest_checkpoint_may_be_one_of_transformers(tmp_path):
    began(tmp_path)
    own = resume_run(tmp_path, max_steps=STEPS + 1, save_strategy="steps", save_steps=STEPS + 1)
    assert (tmp_path / f"checkpoint-{STEPS + 1}" / "manifest.json").is_file()
    again = resume_run(tmp_path, resume=True, max_steps=STEPS + 1)  # from fts's own, which is newer
    assert all(torch.equal(one, two) for one, two in zip(own.model.parameters(), again.model.parameters(), strict=True))
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS + 1}")
    theirs = resume_run(tmp_path, resume=True, max_steps=STEPS)
    assert [theirs.state.global_step, theirs.state.log_history[STEPS]["step"]] == [STEPS, STEPS]


def test_states_of_callbacks_and_the_best_metric_go_on(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    args = transformers.TrainingArguments(str(tmp_path), **(ARGUMENTS | settings | {"learning_rate": 0.0}))
    stopper = transformers.EarlyStoppingCallback(2, 1e-9)
    theirs = transformers.Trainer(bert(), args, train_dataset=sentences(), eval_dataset=sentences(6, seed=1), callbacks=[stopper])
    theirs.train()  # with a rate of 0 nothing improves, so that the third evaluation stops it
    assert theirs.state.global_step == 9
    ours = Trainer(
        bert(),
        TrainingArguments(str(tmp_path), **(ARGUMENTS | settings | {"learning_rate": 0.0})),
        train_dataset=sentences(),
        eval_dataset=sentences(6, seed=1),
        callbacks=[EarlyStoppingCallback(2, 1e-9)],
    )
    ours.train(resume_from_checkpoint=tmp_path / f"checkpoint-{SAVED}")
    assert ours.state.global_step == 9
    assert ours.state.best_global_step == theirs.state.best_global_step == 3


def test_sizes_of_batches_may_change_where_an_update_begins(tmp_path, caplog):
    began(tmp_path, data=sentences(32))
    resumed = resume_run(tmp_path, data=sentences(32), per_device_train_batch_size=8, max_steps=-1, num_train_epochs=2)
    assert resumed.state.epoch == 2.0
    assert resumed.state.global_step == SAVED + 1 + 4  # one update to the end of the first epoch, and those of the second
    assert f"epoch 0.75 took {SAVED} of them, where this run would have taken 3" in report_of(caplog)
    with pytest.raises(CheckpointError, match=r"epoch 0\.75 after 6 updates.*examples would be trained on twice or never"):
        resume_run(tmp_path, data=sentences(32), per_device_train_batch_size=16)


def test_another_rate_is_said_and_wins(tmp_path, caplog):
    began(tmp_path)
    resumed = resume_run(tmp_path, learning_rate=0.5)
    assert "the learning rate, 0.006 at step 6: by the arguments of this run it is 0.3. args win" in report_of(caplog)
    assert resumed.state.log_history[SAVED]["learning_rate"] == pytest.approx(0.3)


def test_a_rate_that_a_metric_changes_is_resumed(tmp_path, caplog):
    rule = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.05}}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "warmup_steps": 0, **rule}
    sides = []
    for kind, arguments in ((transformers.Trainer, transformers.TrainingArguments), (Trainer, TrainingArguments)):
        args = arguments(str(tmp_path), **(ARGUMENTS | settings))
        trainer = kind(bert(), args, train_dataset=sentences(), eval_dataset=sentences(6, seed=1))
        trainer.train(**({"resume_from_checkpoint": tmp_path / "checkpoint-6"} if sides else {}))
        sides.append(trainer)
    rates = [entry["learning_rate"] for entry in sides[0].state.log_history if "learning_rate" in entry]
    assert rates[0] > rates[SAVED] > rates[-1]
    assert_same_training(*sides)
    assert "the rule of the learning rate" in report_of(caplog)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({}, {"optim": "sgd"}, "exp_avg"),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, {}, "momentum_buffer"),
        ({"optim": "rmsprop"}, {"optim": "adagrad"}, "square_avg"),
    ],
)
def test_the_state_of_another_optimizer_is_left_and_said(tmp_path, caplog, before, after, reason):
    began(tmp_path, **before)
    resumed = resume_run(tmp_path, **after)
    assert resumed.state.global_step == STEPS
    (line,) = [text for text in report_of(caplog).splitlines() if "the optimizer's state" in text]
    assert "Not restored: the optimizer's state, which begins anew" in line
    assert reason in line


def test_several_processes_and_a_scale_of_losses_are_said(tmp_path, caplog):
    began(tmp_path)
    for name in ("rng_state_0.pth", "rng_state_1.pth", "scaler.pt"):
        (tmp_path / "checkpoint-6" / name).write_bytes(b"never read")
    resume_run(tmp_path)
    assert "the 2 processes of the run" in report_of(caplog)
    assert "scaler.pt" in report_of(caplog)


def test_the_loss_scale_is_restored(tmp_path, caplog):
    began(tmp_path)
    path = tmp_path / "checkpoint-6" / "scaler.pt"
    torch.save(torch.amp.GradScaler("cpu", init_scale=512.0).state_dict() | {"_growth_tracker": 6}, path)
    resumed = resume_run(tmp_path, fp16=True, logging_steps=1)
    assert "Restored: the scale of fp16 losses, which is 512" in report_of(caplog)
    scales = [entry["loss_scale"] for entry in resumed.state.log_history if "loss_scale" in entry]
    assert scales == [512.0] * (STEPS - 6)
    caplog.clear()
    torch.save({}, path)  # of a scaler that was off
    resume_run(tmp_path, fp16=True)
    assert "which begins anew: scaler.pt has none" in report_of(caplog)
    path.write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match=r"scaler\.pt cannot be read"):
        resume_run(tmp_path, fp16=True)


class Evil:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "scaler.pt"])
@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, name, way):
    began(tmp_path)
    path, made = tmp_path / "checkpoint-6" / name, tmp_path / "made"
    if way == "pickle":
        path.write_bytes(pickle.dumps({"state": Evil(made), "param_groups": []}))
    else:
        torch.save({"state": Evil(made), "param_groups": []}, path)
    if name in ("optimizer.pt", "scheduler.pt"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read as tensors and numbers"):
            resume_run(tmp_path)
    else:
        resume_run(tmp_path)
    assert not made.exists()
    # the file would have done it
    pickle.loads(path.read_bytes()) if way == "pickle" else torch.load(path, weights_only=False)  # noqa: S301
    assert made.exists()


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"state": [], "param_groups": []},
        {"state": {0: []}, "param_groups": []},
        {"state": {}, "param_groups": [{}]},
        {"state": {}, "param_groups": [{"params": ["a"]}]},
    ],
    ids=str,
)
def test_an_optimizer_file_of_another_form_is_an_error(tmp_path, document):
    began(tmp_path)
    torch.save(document, tmp_path / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt (has a list|is not the state_dict\(\) of a torch optimizer)"):
        resume_run(tmp_path)


def test_a_truncated_file_is_an_error(tmp_path):
    began(tmp_path)
    for name in ("optimizer.pt", "model.safetensors"):
        path = tmp_path / "checkpoint-6" / name
        full = path.read_bytes()
        path.write_bytes(full[: len(full) // 2])
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            resume_run(tmp_path)
        path.write_bytes(full)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
def test_the_newest_checkpoint_that_is_truncated_is_skipped(tmp_path, caplog, name):
    began(tmp_path)
    path = tmp_path / f"checkpoint-{STEPS}" / name
    path.write_bytes(path.read_bytes()[:-30])
    resumed = resume_run(tmp_path, resume=True, max_steps=SAVED + 1)
    assert resumed.state.global_step == SAVED + 1
    assert f"checkpoint-{STEPS} is skipped" in report_of(caplog)
    assert f"A run cannot resume from {path.parent}: {path} " in report_of(caplog)


def test_the_newest_checkpoint_without_one_of_its_shards_is_skipped(tmp_path, caplog):
    began(tmp_path)
    newest = tmp_path / f"checkpoint-{STEPS}"
    model = bert()
    (newest / "model.safetensors").unlink()
    model.save_pretrained(newest, max_shard_size="5KB")
    min(newest.glob("model-*.safetensors")).unlink()
    assert resume_run(tmp_path, resume=True, max_steps=SAVED + 1).state.global_step == SAVED + 1
    assert "is missing" in report_of(caplog)


def test_a_model_alone_cannot_be_resumed(tmp_path):
    began(tmp_path, save_only_model=True)
    with pytest.raises(CheckpointError, match=r"has no optimizer\.pt: .*save_only_model=True.*from_pretrained"):
        resume_run(tmp_path)
    with pytest.raises(ArgumentError, match="No valid checkpoint found"):
        resume_run(tmp_path, resume=True)


def test_another_model_is_refused_by_the_name_of_a_weight(tmp_path):
    began(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\.weight has the shape \[3, 16\]; it must be \[5, 16\]"):
        resume_run(tmp_path, bert(labels=5))
    with pytest.raises(CheckpointError, match=r"hidden\.weight is missing"):
        make_trainer(tmp_path, train_dataset=make_examples(30)).train(resume_from_checkpoint=tmp_path / "checkpoint-6")
