"""Small methods and attributes of the Trainer: the same answers from both."""

import inspect
import re

import pytest
import torch

import fts
from tests.trainer.parity.compare import OURS, SIDES, THEIRS, both, made, make
from tests.trainer.parity.models import Plain, accuracy, bert, llama, sentences, texts


def classes(model):
    return {"train_dataset": sentences(), "eval_dataset": sentences(10, seed=1), "compute_metrics": accuracy}


def tokens(model):
    return {"train_dataset": texts()}


def answers(folder, ask, model=None, parts=classes, **options):
    """What each side answers to a question about its Trainer."""
    return [ask(trainer) for trainer in made(folder, model or bert(), parts, **options)]


QUESTIONS = {
    "get_num_trainable_parameters": lambda t: t.get_num_trainable_parameters(),
    "get_decay_parameter_names": lambda t: sorted(t.get_decay_parameter_names(t.model)),
    "get_total_train_batch_size": lambda t: t.get_total_train_batch_size(t.args),
    "get_tp_size": lambda t: t.get_tp_size(),
    "get_cp_size": lambda t: t.get_cp_size(),
    "get_sp_size": lambda t: t.get_sp_size(),
    "is_local_process_zero": lambda t: t.is_local_process_zero(),
    "is_world_process_zero": lambda t: t.is_world_process_zero(),
    "num_examples": lambda t: [t.num_examples(t.get_train_dataloader()), t.num_examples(t.get_eval_dataloader())],
    "floating_point_ops": lambda t: t.floating_point_ops({"input_ids": torch.ones(4, 8, dtype=torch.long)}),
    "is_model_parallel": lambda t: t.is_model_parallel,
    "place_model_on_device": lambda t: t.place_model_on_device,
    "is_in_train": lambda t: t.is_in_train,
    "model_wrapped": lambda t: t.model_wrapped is t.model,
    "model_accepts_loss_kwargs": lambda t: t.model_accepts_loss_kwargs,
    "label_names": lambda t: t.label_names,
    "can_return_loss": lambda t: t.can_return_loss,
    "compute_loss_context_manager": lambda t: hasattr(t.compute_loss_context_manager(), "__enter__"),
    "autocast_smart_context_manager": lambda t: hasattr(t.autocast_smart_context_manager(), "__enter__"),
    "use_cache": lambda t: t.model.config.use_cache,
    "accelerator": lambda t: (
        type(t.accelerator).__module__,
        t.accelerator.gradient_state.num_steps,
        t.accelerator.num_processes,
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(name, tmp_path, capsys):
    theirs, ours = answers(tmp_path, QUESTIONS[name], gradient_accumulation_steps=2)
    assert ours == theirs


@pytest.mark.parametrize("steps", [-1, 5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_initial_training_values(accumulate, steps, tmp_path, capsys):
    options = {"gradient_accumulation_steps": accumulate, "max_steps": steps, "num_train_epochs": 2.5}
    theirs, ours = made(tmp_path, bert(), classes, **options)
    epochs, updates, examples, samples, _, batches, end = theirs.set_initial_training_values(
        theirs.args, theirs.get_train_dataloader()
    )
    # as documented: whether the epochs decide stands where transformers 5.24 has the size of the total batch
    expected = (epochs, updates, examples, samples, steps < 0, batches, end)
    assert tuple(ours.set_initial_training_values(ours.args, ours.get_train_dataloader(), 4 * accumulate)) == expected


def groups(trainer):
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    rates = trainer.get_learning_rates()
    sizes = [sum(parameter.numel() for parameter in group) for group in trainer.get_optimizer_group()]
    first = trainer.get_optimizer_group(trainer.model.get_input_embeddings().weight)
    return rates, sizes, first["weight_decay"], first["lr"], trainer.lr_scheduler.get_last_lr()


def test_optimizer_groups(tmp_path, capsys):
    theirs, ours = answers(tmp_path, groups, weight_decay=0.1, warmup_steps=2)
    assert ours == theirs


def test_the_optimizer_can_be_read_after_training(tmp_path, capsys):
    theirs, ours = both(tmp_path, bert(), classes, weight_decay=0.1, max_steps=3)
    assert ours.get_learning_rates() == pytest.approx(theirs.get_learning_rates())
    assert ours.lr_scheduler.get_last_lr() == pytest.approx(theirs.lr_scheduler.get_last_lr())
    assert ours.get_optimizer_group(ours.model.classifier.weight)["weight_decay"] == 0.1
    assert ours.get_optimizer_group(ours.model.classifier.bias)["weight_decay"] == 0.0


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_get_optimizer_cls_and_kwargs(optim, tmp_path, capsys):
    theirs, ours = answers(tmp_path, lambda t: type(t).get_optimizer_cls_and_kwargs(t.args, t.model), optim=optim)
    assert ours[0].__name__ == theirs[0].__name__
    assert {name: value for name, value in ours[1].items() if value is not None} == {
        name: value for name, value in theirs[1].items() if value is not None
    }


def test_metrics_format(tmp_path, capsys):
    # in transformers it is a function that stands in the class without self
    from transformers.trainer_pt_utils import metrics_format

    metrics = {"train_runtime": 61.5, "total_flos": 2.0**31, "loss": 0.123456, "before_mem_cpu": 3 << 20, "epoch": 1}
    assert make(OURS, tmp_path, Plain(), classes).metrics_format(metrics) == metrics_format(metrics)


def test_num_tokens(tmp_path, capsys):
    trainer = make(OURS, tmp_path, llama(), tokens)
    loader = trainer.get_train_dataloader()
    assert trainer.num_tokens(loader) == 30 * 8
    assert trainer.num_tokens(loader, max_steps=5) == 5 * 4 * 8


def test_batches_of_the_loaders(tmp_path, capsys):
    theirs, ours = made(tmp_path, bert(), classes)
    for name in ("get_train_dataloader", "get_eval_dataloader"):
        expected, found = list(getattr(theirs, name)()), list(getattr(ours, name)())
        assert len(found) == len(expected)
        for one, other in zip(expected, found, strict=True):
            assert other.keys() == one.keys()
            for key in one:
                torch.testing.assert_close(other[key], one[key])
    test = ours.get_test_dataloader(sentences(7))
    assert [len(batch["labels"]) for batch in test] == [5, 2]


def test_get_batch_samples(tmp_path, capsys):
    def ask(trainer):
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, trainer.args.device)
        return len(batches), int(count)

    theirs, ours = answers(tmp_path, ask, llama(), tokens)
    assert ours == theirs


def test_methods_that_compute_a_loss(tmp_path, capsys):
    batch = next(iter(made(tmp_path, bert(), classes)[0].get_eval_dataloader()))

    def ask(trainer):
        trainer.create_optimizer_and_scheduler(1)
        trainer.model.eval()
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        step = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
        return loss.item(), outputs["logits"].detach(), *step

    theirs, ours = answers(tmp_path, ask)
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(one))


def test_callbacks_come_and_go(tmp_path, capsys):
    for side in SIDES:
        base = side.kind("TrainerCallback")
        one, two = type("One", (base,), {}), type("Two", (base,), {})
        trainer = make(side, tmp_path, Plain(), lambda m, o=one: {"callbacks": [o]})
        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
        assert names == ["DefaultFlowCallback", "One", "PrinterCallback"]
        instance = two()
        trainer.add_callback(instance)
        assert trainer.callback_handler.callbacks[-1] is instance
        assert trainer.pop_callback(two) is instance
        assert trainer.pop_callback(two) is None
        trainer.add_callback(instance)
        trainer.remove_callback(instance)
        trainer.remove_callback(one)
        assert [type(callback).__name__ for callback in trainer.callback_handler.callbacks] == [names[0], names[2]]


def test_both_or_neither_model(tmp_path, capsys):
    for side in SIDES:
        args = side.kind("TrainingArguments")(output_dir=str(tmp_path), use_cpu=True)
        with pytest.raises((RuntimeError, ValueError), match="model_init"):
            side.kind("Trainer")(args=args)
        with pytest.raises((RuntimeError, ValueError), match="model_init"):
            side.kind("Trainer")(Plain(), args, model_init=Plain)


def test_parameters_are_those_of_transformers():
    for kind in ("Trainer", "Seq2SeqTrainer"):
        expected = list(inspect.signature(THEIRS.kind(kind).__init__).parameters)
        assert list(inspect.signature(OURS.kind(kind).__init__).parameters)[: len(expected)] == expected


def test_default_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for side in SIDES:
        assert side.kind("Trainer")(Plain()).args.output_dir == "tmp_trainer"


EXPORTS = (
    *("Trainer", "Seq2SeqTrainer", "TrainingArguments", "Seq2SeqTrainingArguments"),
    *("TrainerCallback", "TrainerState", "TrainerControl", "CallbackHandler"),
    *("DefaultFlowCallback", "ProgressCallback", "PrinterCallback", "EarlyStoppingCallback"),
    *("ExportableState", "EvalPrediction", "EvalLoopOutput", "PredictionOutput"),
    *("TrainOutput", "BestRun", "IntervalStrategy", "SaveStrategy"),
    *("SchedulerType", "HubStrategy", "OptimizerNames", "HPSearchBackend"),
    *("AcceleratorConfig", "set_seed", "enable_full_determinism", "default_data_collator"),
)


@pytest.mark.parametrize("name", EXPORTS)
def test_exports(name):
    value = getattr(fts, name)
    assert value is getattr(fts.trainer, name)
    assert value.__doc__


ENUMS = ("IntervalStrategy", "SaveStrategy", "SchedulerType", "HubStrategy", "OptimizerNames", "HPSearchBackend")


@pytest.mark.parametrize("name", ENUMS)
def test_enums_have_the_same_members(name):
    import transformers.trainer_utils
    import transformers.training_args

    theirs = getattr(transformers.training_args, name, None) or getattr(transformers.trainer_utils, name)
    ours = getattr(fts, name)
    assert issubclass(ours, str)
    assert {member.name: member.value for member in theirs}.items() <= {member.name: member.value for member in ours}.items()
    member = next(iter(ours))
    assert member == member.value


TUPLES = ("EvalLoopOutput", "PredictionOutput", "TrainOutput", "BestRun")


@pytest.mark.parametrize("name", TUPLES)
def test_tuples_have_the_same_fields(name):
    import transformers.trainer_utils

    assert getattr(fts, name)._fields == getattr(transformers.trainer_utils, name)._fields


def test_announcement(tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="fts")
    make(OURS, tmp_path, Plain(), classes, max_steps=2, log_level="info").train()
    text = caplog.text
    assert "***** Running training *****" in text
    for line in ("Num examples", "Num Epochs", "Gradient Accumulation steps", "Total optimization steps", "trainable parameters"):
        assert re.search(line, text, re.IGNORECASE), line
