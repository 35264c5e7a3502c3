"""One process with several GPUs; without them, chunks of a batch run one after the other in the place of DataParallel."""

import copy

import pytest
import torch
from torch import nn

from fts.distributed.data_parallel import data_parallel_loss
from fts.errors import ArgumentError
from fts.trainer import Trainer
from tests.trainer.helpers import Linear, losses, make_examples, make_trainer

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, -100], [-100, -100, -100], [-100, -100, -100]])


class SequentialDataParallel(nn.Module):
    """Scatters inputs and gathers outputs as DataParallel does, on the CPU, where that does nothing."""

    def __init__(self, module, device_ids):
        super().__init__()
        self.module, self.count = module, len(device_ids)

    def forward(self, batch, count, *rest):
        chunks = zip(*[value.chunk(self.count) for value in batch.values()], strict=True)
        parts = [dict(zip(batch, values, strict=True)) for values in chunks]
        counts = [None] * self.count if count is None else count.chunk(self.count)
        return self.gather([self.module(part, own, *rest) for part, own in zip(parts, counts, strict=False)])

    def gather(self, found):
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)
        if isinstance(found[0], dict):
            return {name: self.gather([part[name] for part in found]) for name in found[0]}
        return tuple(map(self.gather, zip(*found, strict=True)))


@pytest.fixture
def sequential(monkeypatch):
    monkeypatch.setattr(nn, "DataParallel", SequentialDataParallel)


def net():
    torch.manual_seed(0)
    return nn.Embedding(9, 4)


def mean(model, batch, count):
    """A mean over the labels that count, which is NaN where none does."""
    kept = batch["labels"] != -100
    loss = model(batch["labels"].clamp(min=0)).square().sum(-1)[kept].mean()
    return loss, {"twice": 2 * loss}


def total(model, batch, count):
    kept = batch["labels"] != -100
    return model(batch["labels"].clamp(min=0)).square().sum(-1)[kept].sum() / count


def num_labels(batch):
    return (batch["labels"] != -100).sum()


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize(("loss", "count"), [(mean, None), (total, torch.tensor(8))])
def test_the_loss_and_its_gradient_are_those_of_the_full_batch(sequential, loss, count, devices):
    batch, one = {"labels": TOKENS}, net()
    other = copy.deepcopy(one)
    found = data_parallel_loss(one, loss, num_labels, lambda count: count is not None, range(devices))(one, batch, count)
    found.loss.backward()
    expected = loss(other, batch, count)
    expected = expected if isinstance(expected, tuple) else (expected, {})
    expected[0].backward()
    torch.testing.assert_close(found.loss, expected[0])
    torch.testing.assert_close(one.weight.grad, other.weight.grad)
    assert found.metrics.keys() == expected[1].keys()
    for name, (value, count) in found.metrics.items():
        assert (float(value), int(count)) == (pytest.approx(float(expected[1][name].detach())), 8)


def test_a_trainer_trains_as_with_one(sequential, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    one = make_trainer(tmp_path, Linear(), **settings)
    one.train()
    calls = []
    forward = SequentialDataParallel.forward
    monkeypatch.setattr(SequentialDataParallel, "forward", lambda self, *given: calls.append(self.count) or forward(self, *given))
    monkeypatch.setattr("fts.trainer.run.run_mixin.device_ids", lambda args: (0, 1))
    several = make_trainer(tmp_path, Linear(), **settings)
    several.train()
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    torch.testing.assert_close(several.model.w, one.model.w)
    assert calls == [2] * 8


def test_a_batch_size_that_fits_is_one_for_each_gpu(tmp_path, monkeypatch):
    tried = []

    class Full(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            tried.append(len(inputs["labels"]))
            if tried[-1] > 3:
                raise torch.OutOfMemoryError("full")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    args = make_trainer(tmp_path, auto_find_batch_size=True, max_steps=1, per_device_train_batch_size=4).args
    args._n_gpu = 3
    Full(Linear(), args, train_dataset=make_examples(24)).train()
    assert tried == [12, 6, 3]


def test_what_cannot_be_parallel_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("fts.trainer.run.run_mixin.device_ids", lambda args: (0, 1))

    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = make_trainer(tmp_path, Linear())
    trainer.args.torch_compile = True
    with pytest.raises(ArgumentError, match="torch_compile=True cannot be used with 2 GPUs in one process"):
        trainer.train()
    with pytest.raises(ArgumentError, match="an overridden training_step cannot be used with 2 GPUs"):
        Own(Linear(), make_trainer(tmp_path).args, train_dataset=make_examples(8)).train()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    from fts import TrainingArguments

    found = []
    for count in (1, 2):
        settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12 // count, **settings)
        args._n_gpu = count
        trainer = Trainer(Linear(), args, train_dataset=make_examples(24))
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
