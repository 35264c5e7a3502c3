"""An update of a trainer's run, replayed bit for bit."""

import pytest
import torch
from torch import nn

from fts.errors import ArgumentError, NonFiniteError
from fts.loops import Position
from fts.trainer import Trainer, TrainerCallback
from tests.trainer.helpers import Regression, arguments, make_examples, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20, "logging_steps": 1}


def trained(tmp_path, make=make_trainer, **changes):
    trainer = make(tmp_path, **(SAVING | changes))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"model_init": Regression},
        {"nonfinite": "raise"},
        {"optim": "adafactor", "count": 19},
        {"dataloader_num_workers": 2},
    ],
    ids=str,
)
def test_an_update_is_replayed_bit_for_bit(tmp_path, changes):
    run = trained(tmp_path, **changes)
    torch.manual_seed(99)
    trainer = make_trainer(tmp_path, **(SAVING | changes))
    found = trainer.replay(tmp_path / "checkpoint-5", 10)
    assert found.equal is True, found.differences
    assert found.compared_with == tmp_path / "checkpoint-10"
    assert set(found.gradients) == {name for name, _ in trainer.model.named_parameters()}
    logged = next(entry for entry in run.state.log_history if entry.get("step") == 10 and "loss" in entry)
    assert logged["loss"] == pytest.approx(found.loss, abs=1e-4)  # a log is rounded
    assert logged["grad_norm"] == pytest.approx(float(found.metrics["grad_norm"]), rel=1e-6)
    assert len(found.examples) == len(set(found.examples)) > 1
    x = torch.cat([part["x"] for part in found.batch]) if isinstance(found.batch, tuple) else found.batch["x"]
    data = make_examples(changes.get("count", 22))
    assert torch.equal(x, torch.stack([data[index]["x"] for index in found.examples]))


def test_a_torch_optimizer_and_its_schedule(tmp_path):
    def make(tmp_path, **changes):
        torch.manual_seed(0)
        model = Regression()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return make_trainer(tmp_path, model, optimizers=(optimizer, scheduler), **changes)

    trained(tmp_path, make)
    found = make(tmp_path, **SAVING).replay(tmp_path / "checkpoint-5", 15)
    assert found.equal is True, found.differences
    assert found.gradients


def test_an_overridden_training_step(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs))["loss"] * 3
            loss.backward()
            return loss.detach()

    def make(tmp_path, **changes):
        torch.manual_seed(0)
        return Own(Regression(), arguments(tmp_path, **changes), train_dataset=make_examples(22))

    trained(tmp_path, make)
    found = make(tmp_path, **SAVING).replay(tmp_path / "checkpoint-5", 10)
    assert found.equal is True and found.gradients


def test_batches_that_a_trainer_draws_have_their_example_indices(tmp_path):
    class Drawing(Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            return batches, None

    def make(tmp_path, **changes):
        torch.manual_seed(0)
        return Drawing(
            Regression(), arguments(tmp_path, gradient_accumulation_steps=2, **changes), train_dataset=make_examples(24)
        )

    trained(tmp_path, make)
    found = make(tmp_path, **SAVING).replay(tmp_path / "checkpoint-5", 10)
    assert found.equal is True
    x, data = torch.cat([part["x"] for part in found.batch]), make_examples(24)
    assert torch.equal(x, torch.stack([data[index]["x"] for index in found.examples]))


def test_settings_that_a_callback_wrote_before_the_checkpoint(tmp_path):
    class Decay(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 3:
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)

    trained(tmp_path, callbacks=[Decay()])
    found = make_trainer(tmp_path, **SAVING).replay(tmp_path / "checkpoint-5", 10)
    assert found.equal is True, found.differences


@pytest.mark.parametrize("nonfinite", ["raise", "ignore", "skip"])
def test_the_item_that_is_poisoned(tmp_path, nonfinite):
    settings = SAVING | {"save_steps": 2, "max_steps": 10, "nonfinite": nonfinite}

    def make(poisoned=None):
        torch.manual_seed(0)
        data = make_examples(22)
        if poisoned is not None:
            data[poisoned] = {**data[poisoned], "x": torch.tensor([1.0, float("nan"), 0.0, 0.0])}
        return Trainer(Regression(), arguments(tmp_path, **settings), train_dataset=data)

    item = make().train_source(42).example_indices(0, 3)[1]  # of the fourth update
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="In step 4 the loss is nan"):
            make(item).train()
    else:
        make(item).train()
    found = make(item).replay(tmp_path / "checkpoint-2", 4)
    assert found.nonfinite_examples == [item] and found.examples[1] == item
    assert found.loss != found.loss
    names = {name for name, _ in Regression().named_parameters()}
    assert set(found.nonfinite["gradients"]) == names
    assert "before" not in found.nonfinite
    if nonfinite == "raise":
        assert isinstance(found.error, NonFiniteError) and found.after is None
    else:
        assert found.equal is True
        assert set(found.nonfinite.get("after", ())) == (names if nonfinite == "ignore" else set())


def test_other_sizes_of_batches_are_refused(tmp_path):
    trained(tmp_path)
    trainer = make_trainer(tmp_path, **(SAVING | {"per_device_train_batch_size": 2}))
    with pytest.raises(ArgumentError, match="another batch would be replayed"):
        trainer.replay(tmp_path / "checkpoint-5", 10)


def test_a_run_can_be_trained_after_a_replay(tmp_path):
    run = trained(tmp_path)
    trainer = make_trainer(tmp_path, **SAVING)
    assert trainer.replay(tmp_path / "checkpoint-15", 16).position == Position(2, 3)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-15")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor)


def test_neftune(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 1)

        def get_input_embeddings(self):
            return self.words

        def forward(self, ids, labels):
            return {"loss": (self.head(self.words(ids).mean(1)).squeeze(-1) - labels).square().mean()}

    def make(tmp_path, **changes):
        torch.manual_seed(0)
        data = [{"ids": torch.arange(3) + number % 6, "labels": float(number % 3)} for number in range(20)]
        return Trainer(Words(), arguments(tmp_path, neftune_noise_alpha=5.0, **changes), train_dataset=data)

    trained(tmp_path, make)
    assert make(tmp_path, **SAVING).replay(tmp_path / "checkpoint-5", 10).equal is True


@pytest.mark.parametrize("lora", [False, True])
def test_a_transformer_with_dropout_and_padding(tmp_path, lora):
    from transformers import BertConfig, BertForSequenceClassification

    def make(tmp_path, **changes):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        model = BertForSequenceClassification(config)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
        generator = torch.Generator().manual_seed(1)
        data = [{"input_ids": torch.randint(1, 40, (8,), generator=generator), "labels": number % 2} for number in range(22)]
        return Trainer(model, arguments(tmp_path, weight_decay=0.01, **changes), train_dataset=data)

    trained(tmp_path, make)
    trainer = make(tmp_path, **SAVING)
    found = trainer.replay(tmp_path / "checkpoint-5", 10)
    assert found.equal is True, found.differences
    assert set(found.gradients) == {name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("stateful", [False, True])
def test_a_stream(tmp_path, stateful):
    class Stream(torch.utils.data.IterableDataset):
        begin = 0

        def __iter__(self):
            for number, row in enumerate(make_examples(22)):
                if number >= self.begin:
                    self.given = number + 1
                    yield row
            self.begin = 0

    class Stateful(Stream):
        def state_dict(self):
            return {"given": self.given}

        def load_state_dict(self, state):
            self.begin = state["given"]

    def make(tmp_path, **changes):
        torch.manual_seed(0)
        return Trainer(Regression(), arguments(tmp_path, **changes), train_dataset=(Stateful if stateful else Stream)())

    trained(tmp_path, make)
    found = make(tmp_path, **SAVING).replay(tmp_path / "checkpoint-5", 10)
    assert found.equal is True, found.differences
    assert found.examples is None
