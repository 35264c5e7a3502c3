"""The same numbers as transformers' Trainer, step by step, on a small model without dropout."""

import pytest
import torch

from fts.trainer import Trainer, TrainingArguments

transformers = pytest.importorskip("transformers")

STEPS = 20


def bert(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def sentences(count: int = 45, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 3} for row in ids]


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(kind, arguments, tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 7,
        "learning_rate": 5e-3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    } | changes
    trainer = kind(
        bert(),
        arguments(**settings),
        train_dataset=sentences(),
        eval_dataset=sentences(20, seed=1),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    return trainer


def curves(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in entries] for name in ("loss", "learning_rate", "epoch", "step", "grad_norm")}


CASES = {
    "plain": {},
    "constant without clipping": {"lr_scheduler_type": "constant", "max_grad_norm": 1e9},
    "cosine with warm-up and decay": {"lr_scheduler_type": "cosine", "warmup_steps": 5, "weight_decay": 0.3},
    "strong clipping and SGD": {"max_grad_norm": 0.05, "optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.1},
    "polynomial, another order": {"lr_scheduler_type": "polynomial", "data_seed": 3, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "epochs, short last batch": {"max_steps": -1, "num_train_epochs": 2.5, "logging_steps": 3, "logging_first_step": True},
    # without its last batch, training is the same; evaluation is not, since there we keep every row
    "last batch dropped": {"dataloader_drop_last": True, "max_steps": 15},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 8, "max_steps": 15},
}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_transformers(case, tmp_path, capsys):
    theirs = run(transformers.Trainer, transformers.TrainingArguments, tmp_path, **CASES[case])
    ours = run(Trainer, TrainingArguments, tmp_path, **CASES[case])
    expected, found = curves(theirs), curves(ours)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-4, abs=1e-6), name
    for name, tensor in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    evaluations = [[entry for entry in t.state.log_history if "eval_loss" in entry] for t in (theirs, ours)]
    for one, other in zip(*evaluations, strict=True):
        keys = ("eval_loss", "eval_accuracy", "epoch", "step")
        assert [other[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-4)
        assert one.keys() == other.keys()
    assert ours.state.log_history[-1].keys() == theirs.state.log_history[-1].keys()


def test_same_predictions_as_transformers(tmp_path, capsys):
    results = []
    for kind, arguments in ((transformers.Trainer, transformers.TrainingArguments), (Trainer, TrainingArguments)):
        args = arguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=6, report_to="none", disable_tqdm=True
        )
        results.append(kind(bert(), args, compute_metrics=compute_metrics).predict(sentences(20)))
    theirs, ours = results
    torch.testing.assert_close(torch.tensor(ours.predictions), torch.tensor(theirs.predictions))
    assert ours.label_ids.tolist() == theirs.label_ids.tolist()
    assert ours.metrics["test_accuracy"] == theirs.metrics["test_accuracy"]
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-5)
    assert ours.metrics.keys() == theirs.metrics.keys() - {"test_model_preparation_time"}
