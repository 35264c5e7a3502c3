"""TrainingArguments(nonfinite=...): what a loss or gradient that is NaN or infinite does to a run."""

import math

import pytest
import torch

from fts import steps, transforms as tx
from fts.errors import ArgumentError, NonFiniteError
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Linear, Regression, losses, make_trainer, rows

BAD = 13
"""The row that is bad; rows are in order, four in a batch, so it is in the fourth of six batches."""


def with_bad(count=22, value=math.nan, *bad):
    data = rows(count)
    for row in bad or (BAD,):
        data[row] = {"x": torch.full((4,), value), "labels": 0.0}
    return data


def trainer_on(data, tmp_path, model=None, **changes):
    torch.manual_seed(0)
    settings = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "logging_steps": 1, "dataloader_drop_last": True}
    return make_trainer(tmp_path, model or Regression(), train_dataset=data, **(settings | changes))


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(one, two):
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name


def test_the_default_raises_and_says_where(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 100, "lr_scheduler_type": "constant"}
    trainer = trainer_on(with_bad(), tmp_path, **options)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "In step 4 the loss is nan; the gradients of 6 of 6 parameters are not finite: hidden.weight (32 NaN" in text
    assert "In step 4: epoch 0, batch 3 (from 0), items 12, 13, 14, 15 of the data." in text
    assert "nonfinite='skip'" in text
    assert (
        f"A checkpoint of step 3 was written: train(resume_from_checkpoint={str(tmp_path / 'checkpoint-3')!r}) goes on." in text
    )
    good = trainer_on(with_bad(), tmp_path / "good", max_steps=3, **options)
    good.train()
    assert_same(trainer, good)  # nothing of the bad batch is in the weights
    resumed = trainer_on(with_bad(), tmp_path, nonfinite="ignore", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_nothing_is_written_where_nothing_was_to_be_saved(tmp_path):
    with pytest.raises(NonFiniteError):
        trainer_on(with_bad(), tmp_path / "run").train()
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_skipping_leaves_the_update_out_and_counts(tmp_path):
    trainer = trainer_on(with_bad(), tmp_path, Linear(), nonfinite="skip")
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in trainer.model.parameters())
    entries = [entry for entry in trainer.state.log_history if "skipped_total" in entry]
    assert [entry["skipped_total"] for entry in entries] == [0, 0, 0, 1, 1]

    def by_hand():
        model = Linear()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        data = with_bad()
        for step in range(5):
            batch = data[4 * step : 4 * step + 4]
            if step == 3:
                continue
            for group in optimizer.param_groups:  # the schedule goes on by applied updates
                group["lr"] = 0.01 * (1 - sum(1 for done in range(step) if done != 3) / 5)
            x, labels = torch.stack([row["x"] for row in batch]), torch.tensor([row["labels"] for row in batch])
            optimizer.zero_grad()
            model(x, labels)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model

    torch.testing.assert_close(trainer.model.w, by_hand().w)


def test_the_limit_of_skipped_updates_raises(tmp_path):
    data = with_bad(22, math.nan, 5, 9, 13)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row \(limit 3, 3 in all\)"):
        trainer_on(data, tmp_path, nonfinite="skip", nonfinite_limit=3).train()
    trainer_on(data, tmp_path, nonfinite="skip", nonfinite_limit=4).train()


def test_a_skipping_run_resumes_bit_for_bit(tmp_path):
    whole = trainer_on(with_bad(), tmp_path / "whole", nonfinite="skip", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer_on(with_bad(), tmp_path / "whole", nonfinite="skip")
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    assert_same(whole, resumed)
    assert losses(whole)[4:] == losses(resumed)[4:]


class Counts(TrainerCallback):
    """Rows' first numbers, as they were trained on; steps as callbacks saw them."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_rolling_back_is_the_run_without_the_bad_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("fts.trainer.faults.EVERY", 2)
    data = with_bad(42, math.nan, 13, 14)  # both in one batch
    counts = Counts()
    trainer = trainer_on(data, tmp_path, Linear(), nonfinite="rollback", max_steps=8, callbacks=[counts])
    trainer.train()
    assert counts.steps == [1, 2, 3, 3, 4, 5, 6, 7, 8]  # step 4 failed; back to 2, whose next batch is the fifth
    left = [row for index, row in enumerate(data) if not 8 <= index < 16]
    good = trainer_on(left, tmp_path / "good", Linear(), max_steps=8)
    good.train()
    assert_same(trainer, good)
    assert losses(trainer) == losses(good)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(good.state.log_history[-1]["train_loss"])
    assert trainer.state.total_flos == good.state.total_flos


def test_a_run_that_rolled_back_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("fts.trainer.faults.EVERY", 2)
    data = with_bad(42, math.nan, 13)
    options = {"nonfinite": "rollback", "max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_on(data, tmp_path, **options)
    whole.train()
    for step in (3, 5):
        resumed = trainer_on(data, tmp_path / f"from-{step}", **options)
        resumed.train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
        assert_same(whole, resumed)


def test_rolling_back_too_often_raises(tmp_path):
    data = with_bad(42, math.nan, 5, 13, 21)
    with pytest.raises(NonFiniteError) as caught:
        trainer_on(data, tmp_path, nonfinite="rollback", nonfinite_limit=2, max_steps=8).train()
    assert any("had gone back 2 times before" in note for note in caught.value.__notes__)


def test_ignoring_goes_on_with_what_comes(tmp_path):
    trainer = trainer_on(with_bad(), tmp_path, nonfinite="ignore")
    trainer.train()
    assert trainer.state.global_step == 5
    assert not trainer.model.head.weight.isfinite().any()


def test_a_compiled_step_is_noticed_after_its_update(tmp_path):
    trainer = trainer_on(with_bad(), tmp_path, Linear(), torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(NonFiniteError, match="loss = nan and grad_norm = nan after an update, which is in the parameters now"):
        trainer.train()


def test_a_step_of_ones_own(tmp_path):
    def mine(model, **options):
        transform = tx.sgd(0.1)
        return steps.train_step(steps.module_loss(model), transform)

    model = Linear()
    with pytest.raises(NonFiniteError, match="In step 4 the loss is nan; the gradients of 1 of 1 parameters"):
        trainer_on(with_bad(), tmp_path, model, step=mine(model)).train()
    with pytest.raises(ArgumentError, match=r"nonfinite='skip' cannot get into a whole step of your own.*tx.skip_nonfinite"):
        trainer_on(with_bad(), tmp_path, model, step=mine(model), nonfinite="skip").train()
    trainer = trainer_on(with_bad(), tmp_path, Linear(), step=tx.sgd(0.1), nonfinite="skip")
    trainer.train()
    assert trainer.model.w.isfinite().all()


def test_a_torch_schedule_cannot_roll_back(tmp_path):
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ArgumentError, match="cannot take back the steps of a torch schedule"):
        trainer_on(with_bad(), tmp_path, model, optimizers=(optimizer, schedule), nonfinite="rollback").train()


def test_another_policy_on_resume_is_said_where_it_does_not_fit(tmp_path):
    trainer_on(rows(22), tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = trainer_on(rows(22), tmp_path, nonfinite="skip")
    with pytest.raises(Exception, match=r"nonfinite: skip \(from args\) != raise \(from training_args.json\)"):
        resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
