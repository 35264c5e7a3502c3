"""Kinds of models, optimizers and data: PEFT, checkpointing of activations, noise, streams, tables, model_init."""

import copy

import numpy as np
import pytest
import torch

from tests.trainer.parity.compare import (
    OURS,
    SIDES,
    assert_same_training,
    assert_same_weights,
    both,
    entries,
    made,
    make,
)
from tests.trainer.parity.models import Plain, bert, gpt2, llama, sentences, t5, texts


def classes(model):
    return {"train_dataset": sentences(), "eval_dataset": sentences(10, seed=1)}


def tokens(model):
    return {"train_dataset": texts(), "eval_dataset": texts(10, seed=1)}


# Optimizers given by the caller


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def test_optimizer_and_scheduler_given(tmp_path, capsys):
    def parts(model):
        optimizer = optimizer_of(model)
        return classes(model) | {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.8**n))}

    assert_same_training(*both(tmp_path, Plain(), parts))


def test_optimizer_given(tmp_path, capsys):
    def parts(model):
        return classes(model) | {"optimizers": (optimizer_of(model), None)}

    theirs, ours = both(tmp_path, Plain(), parts, warmup_steps=2)
    assert_same_training(theirs, ours)
    assert ours.get_learning_rates() == pytest.approx(theirs.get_learning_rates())


def test_optimizer_with_groups_given(tmp_path, capsys):
    def parts(model):
        groups = [{"params": list(model.embed.parameters()), "lr": 0.1}, {"params": list(model.head.parameters())}]
        return classes(model) | {"optimizers": (torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1), None)}

    theirs, ours = both(tmp_path, Plain(), parts)  # the norm is in no group
    assert_same_training(theirs, ours)


def test_optimizer_class_given(tmp_path, capsys):
    def parts(model):
        return classes(model) | {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 0.02, "betas": (0.8, 0.99)})}

    assert_same_training(*both(tmp_path, Plain(), parts, weight_decay=0.1))


def test_optimizers_exclude_other_ways(tmp_path, capsys):
    for side in SIDES:

        def parts(model):
            return {"optimizers": (optimizer_of(model), None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}

        with pytest.raises((RuntimeError, ValueError)):
            make(side, tmp_path, Plain(), parts)


# Models


class SampledModel(torch.nn.Module):
    """A module whose weights are drawn from torch's generator as it stands."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 3)

    def forward(self, input_ids, labels=None):
        logits = self.embed(input_ids).mean(1)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_model_init(tmp_path, capsys):
    def parts(model):
        return classes(model) | {"model_init": SampledModel}

    theirs, ours = both(tmp_path, None, parts)
    assert_same_training(theirs, ours)
    first = copy.deepcopy(ours.model.state_dict())
    theirs.train()
    ours.train()
    assert_same_weights(theirs, ours)
    for name, tensor in ours.model.state_dict().items():  # each training begins anew
        torch.testing.assert_close(tensor, first[name])


def test_model_init_is_seeded(tmp_path, capsys):
    assert_same_training(*both(tmp_path, None, lambda model: classes(model) | {"model_init": SampledModel}, seed=11))


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lora(accumulate, tmp_path, capsys):
    model = lora(llama())
    options = {"gradient_accumulation_steps": accumulate, "save_strategy": "steps", "save_steps": 4, "max_steps": 5}
    theirs, ours = both(tmp_path, model, tokens, **options)
    assert_same_training(theirs, ours)
    start = model.state_dict()
    changed = {name for name, tensor in ours.model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    for side in SIDES:
        files = {path.name for path in (tmp_path / side.name / "checkpoint-4").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files, side.name
    assert ours.get_num_trainable_parameters() == theirs.get_num_trainable_parameters()


def test_frozen_parameters(tmp_path, capsys):
    model = bert()
    model.bert.requires_grad_(False)
    theirs, ours = both(tmp_path, model, classes)
    assert_same_training(theirs, ours)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing(reentrant, tmp_path, capsys):
    options = {"gradient_checkpointing": True, "max_steps": 4}
    if reentrant is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    theirs, ours = both(tmp_path, llama(), tokens, **options)
    assert_same_training(theirs, ours)
    assert ours.model.is_gradient_checkpointing
    without = make(OURS, tmp_path, llama(), tokens, max_steps=4)
    without.train()
    assert_same_training(without, ours)


def test_tied_weights_stay_tied(tmp_path, capsys):
    trainer = make(OURS, tmp_path, gpt2(), tokens, max_steps=2)
    trainer.train()
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight


# Noise on embeddings


class Seen:
    """Records what the embeddings give, in training and in evaluation."""

    def __init__(self, model):
        self.noisy = {True: False, False: False}
        self.model = model
        model.get_input_embeddings().register_forward_hook(self)
        model.model.layers[0].register_forward_pre_hook(self.compare)

    def __call__(self, module, inputs, output):
        self.clean = torch.nn.functional.embedding(inputs[0], module.weight.detach())

    def compare(self, module, inputs):
        self.noisy[self.model.training] |= not torch.equal(inputs[0].detach(), self.clean)


def test_neftune_adds_noise_in_training_alone(tmp_path, capsys):
    noisy = made(tmp_path, llama(), tokens, neftune_noise_alpha=5.0, max_steps=3, eval_strategy="steps", eval_steps=2)
    for trainer in noisy:
        seen = Seen(trainer.model)
        trainer.train()
        assert seen.noisy == {True: True, False: False}
        seen.noisy[False] = False
        trainer.evaluate()
        assert not seen.noisy[False]
        clean = make(OURS, tmp_path, llama(), tokens, max_steps=3)
        clean.train()
        assert entries(clean)[0]["loss"] != entries(trainer)[0]["loss"]
        # within the reach of the noise: alpha / sqrt(tokens * width) on each element
        assert entries(trainer)[0]["loss"] == pytest.approx(entries(clean)[0]["loss"], rel=0.3)


# Data


class Stream(torch.utils.data.IterableDataset):
    """Rows in their own order, without a length."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        yield from self.examples


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("steps", [5, 20])
def test_stream(steps, accumulate, tmp_path, capsys):
    # a pass of 6 batches: transformers drops the gradients of the micro-batches that are left over at the end of a stream
    def parts(model):
        return {"train_dataset": Stream(sentences(24)), "eval_dataset": Stream(sentences(9, seed=1))}

    theirs, ours = both(tmp_path, bert(), parts, max_steps=steps, gradient_accumulation_steps=accumulate)
    assert_same_training(theirs, ours)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)


def test_what_is_left_of_a_stream_is_an_update(tmp_path, capsys):
    """Deliberate: 7 batches are updates of 3, 3 and 1 also where the data has no length."""

    def train(data):
        trainer = make(OURS, tmp_path, bert(), lambda m: {"train_dataset": data}, max_steps=3, **options)
        trainer.train()
        return [(entry["loss"], entry["grad_norm"]) for entry in entries(trainer)]

    examples = sentences(26)
    options = {"gradient_accumulation_steps": 3, "train_sampling_strategy": "sequential"}
    assert train(Stream(examples)) == train(examples)


def test_stream_without_max_steps_is_refused(tmp_path, capsys):
    for side in SIDES:
        with pytest.raises(ValueError, match="max_steps"):
            make(side, tmp_path, bert(), lambda model: {"train_dataset": Stream(sentences())}, max_steps=-1).train()


def table(examples):
    datasets = pytest.importorskip("datasets")
    columns = {name: [np.asarray(row[name]).tolist() for row in examples] for name in examples[0]}
    return datasets.Dataset.from_dict(columns | {"unused": [f"row {i}" for i in range(len(examples))]})


@pytest.mark.parametrize("workers", [0, 2])
def test_table(workers, tmp_path, capsys):
    def parts(model):
        return {"train_dataset": table(sentences()), "eval_dataset": table(sentences(10, seed=1))}

    assert_same_training(*both(tmp_path, bert(), parts, max_steps=4, dataloader_num_workers=workers))


def test_streamed_table(tmp_path, capsys):
    def parts(model):
        return {"train_dataset": table(sentences()).to_iterable_dataset()}

    assert_same_training(*both(tmp_path, bert(), parts, max_steps=10))


def test_label_names(tmp_path, capsys):
    class Renamed(Plain):
        def forward(self, input_ids, target=None):
            return super().forward(input_ids, target)

    examples = [{"input_ids": row["input_ids"], "target": row["labels"]} for row in sentences()]
    theirs, ours = both(
        tmp_path, Renamed(), lambda m: {"train_dataset": examples, "eval_dataset": examples[:10]}, label_names=["target"]
    )
    assert_same_training(theirs, ours)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("key", ["label", "label_ids"])
def test_labels_by_other_names(key, tmp_path, capsys):
    examples = [{"input_ids": row["input_ids"], key: torch.tensor(row["labels"])} for row in sentences()]
    assert_same_training(*both(tmp_path, bert(), lambda model: {"train_dataset": examples}, max_steps=4))


def test_padding_collator(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 49} | {f"w{i}": i for i in range(1, 49)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    examples = [
        {"input_ids": row["input_ids"][: 3 + i % 5].tolist(), "label": row["labels"]} for i, row in enumerate(sentences())
    ]

    def parts(model):
        return {"train_dataset": examples, "processing_class": tokenizer}

    theirs, ours = both(tmp_path, bert(), parts, max_steps=4, save_strategy="steps", save_steps=4)
    assert_same_training(theirs, ours)
    assert type(ours.data_collator).__name__ == type(theirs.data_collator).__name__
    for side in SIDES:
        assert (tmp_path / side.name / "checkpoint-4" / "tokenizer.json").is_file()


def test_examples_of_like_length_share_batches(tmp_path, capsys):
    """group_by_length: which examples share a batch is random, so the lengths are compared and not the batches."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 15, (96,), generator=generator).tolist()
    examples = [{"input_ids": torch.ones(length, dtype=torch.long), "labels": 1} for length in lengths]
    seen = []

    def collate(part):
        seen.append([len(row["input_ids"]) for row in part])
        width = max(seen[-1])
        ids = torch.stack([torch.nn.functional.pad(row["input_ids"], (0, width - len(row["input_ids"]))) for row in part])
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in part])}

    options = {"group_by_length": True, "max_steps": -1, "num_train_epochs": 1}
    trainer = make(OURS, tmp_path, bert(), lambda m: {"train_dataset": examples, "data_collator": collate}, **options)
    loader = trainer.get_train_dataloader()
    seen.clear()
    list(loader)
    assert sorted(length for part in seen for length in part) == sorted(lengths)
    width = np.mean([max(part) - min(part) for part in seen])
    assert width < 2.5  # 4 of 13 lengths at random range over 8
    assert max(seen[0]) == max(lengths)  # the widest batch first, so that memory runs out at once or never
    trainer.train()
    assert trainer.state.global_step == 24


# One Trainer, several calls


def test_trained_twice(tmp_path, capsys):
    # transformers keeps the optimizer's state, fts begins with none; and it takes torch's seed where data_seed is not given
    theirs, ours = both(tmp_path, Plain(), classes, max_steps=4, optim="sgd", data_seed=42)
    theirs.train()
    ours.train()
    assert ours.state.global_step == theirs.state.global_step == 4
    assert_same_weights(theirs, ours)


@pytest.mark.parametrize("model", [bert, llama, t5])
def test_evaluation_changes_nothing(model, tmp_path, capsys):
    parts = classes if model is bert else tokens
    plain = make(OURS, tmp_path, model(), parts, max_steps=6)
    plain.train()
    evaluated = make(OURS, tmp_path, model(), parts, max_steps=6, eval_strategy="steps", eval_steps=2)
    evaluated.train()
    assert [e["loss"] for e in entries(evaluated)] == [e["loss"] for e in entries(plain)]


@pytest.mark.parametrize("at", [3, 4, 8])
def test_resumed(at, tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 10, "gradient_accumulation_steps": 2}
    both(tmp_path, bert(), classes, **options)
    theirs, ours = made(tmp_path, bert(), classes, **options)
    for side, trainer in zip(SIDES, (theirs, ours), strict=True):
        trainer.train(resume_from_checkpoint=str(tmp_path / side.name / f"checkpoint-{at}"))
    losses = [entry["loss"] for entry in entries(ours)]
    assert_same_training(theirs, ours, full=False)
    # the mean over the full run, as if it had not been interrupted; transformers has that of the part after it
    assert ours.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)
    assert theirs.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses[at:]) / (10 - at), rel=1e-4)
