"""TrainingArguments(nonfinite=...): what a loss or gradient that is NaN or infinite does to a run."""

import math

import pytest
import torch

from fts import TrainState, loops, steps, transforms as tx
from fts.errors import ArgumentError, CheckpointError, NonFiniteError
from fts.trainer import TrainerCallback
from fts.trainer.model.label_counts import all_labels_ignored
from tests.trainer.helpers import Linear, Regression, losses, make_examples, make_trainer

BAD = 13
"""The example that is bad; examples are in order, four in a batch, so it is in the fourth of six batches."""


def with_bad(count=22, value=math.nan, *bad):
    data = make_examples(count)
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
    assert "In step 4: epoch 0, batch 3 (from 0), examples 12, 13, 14, 15 of the data." in text
    assert "nonfinite='skip'" in text
    assert (
        f"A checkpoint of step 3 was written: train(resume_from_checkpoint={str(tmp_path / 'checkpoint-3')!r}) resumes it."
        in text
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
            for group in optimizer.param_groups:  # the schedule advances by applied updates
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
    full = trainer_on(with_bad(), tmp_path / "full", nonfinite="skip", save_strategy="steps", save_steps=4)
    full.train()
    resumed = trainer_on(with_bad(), tmp_path / "full", nonfinite="skip")
    resumed.train(resume_from_checkpoint=tmp_path / "full" / "checkpoint-4")
    assert_same(full, resumed)
    assert losses(full)[4:] == losses(resumed)[4:]


class Counts(TrainerCallback):
    """Rows' first numbers, as they were trained on; steps as callbacks saw them."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_rolling_back_is_the_run_without_the_bad_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("fts.trainer.run.nonfinite.COPY_INTERVAL", 2)
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
    monkeypatch.setattr("fts.trainer.run.nonfinite.COPY_INTERVAL", 2)
    data = with_bad(42, math.nan, 13)
    options = {"nonfinite": "rollback", "max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    full = trainer_on(data, tmp_path, **options)
    full.train()
    for step in (3, 5):
        resumed = trainer_on(data, tmp_path / f"from-{step}", **options)
        resumed.train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
        assert_same(full, resumed)


def test_rolling_back_too_often_raises(tmp_path):
    data = with_bad(42, math.nan, 5, 13, 21)
    with pytest.raises(NonFiniteError) as caught:
        trainer_on(data, tmp_path, nonfinite="rollback", nonfinite_limit=2, max_steps=8).train()
    assert any("had rolled back 2 times before" in note for note in caught.value.__notes__)


def test_ignoring_continues_with_nonfinite_values(tmp_path):
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
    with pytest.raises(
        ArgumentError, match=r"nonfinite='skip' cannot be added to a complete step of your own.*tx.skip_nonfinite"
    ):
        trainer_on(with_bad(), tmp_path, model, step=mine(model), nonfinite="skip").train()
    trainer = trainer_on(with_bad(), tmp_path, Linear(), step=tx.sgd(0.1), nonfinite="skip")
    trainer.train()
    assert trainer.model.w.isfinite().all()


def test_a_torch_schedule_cannot_roll_back(tmp_path):
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ArgumentError, match="cannot undo the steps of a torch scheduler"):
        trainer_on(with_bad(), tmp_path, model, optimizers=(optimizer, schedule), nonfinite="rollback").train()


@pytest.mark.parametrize("optim", ["adamw_torch", "schedule_free_adamw"])
@pytest.mark.parametrize(("before", "after"), [("raise", "skip"), ("skip", "raise")])
def test_a_run_resumes_with_another_policy_bit_for_bit(tmp_path, caplog, before, after, optim):
    caplog.set_level("INFO", "fts.trainer.checkpoints.train_state")
    options = {"optim": optim, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    full = trainer_on(make_examples(22), tmp_path, nonfinite=before, **options)
    full.train()
    resumed = trainer_on(make_examples(22), tmp_path, nonfinite=after, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same(full, resumed)
    (record,) = [record for record in caplog.records if record.name == "fts.trainer.checkpoints.train_state"]
    assert ("their count begins at 0" if after == "skip" else "counts 0 skipped updates: this run skips none") in record.message


def test_a_run_that_a_nan_ended_resumes_as_its_error_advises(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 100}
    with pytest.raises(NonFiniteError):
        trainer_on(with_bad(), tmp_path, **options).train()
    resumed = trainer_on(with_bad(), tmp_path, nonfinite="skip", **options)
    resumed.train(resume_from_checkpoint=True)
    skipping = trainer_on(with_bad(), tmp_path / "skipping", nonfinite="skip")
    skipping.train()
    assert_same(resumed, skipping)


def test_the_best_checkpoint_is_loaded_that_was_written_under_another_policy(tmp_path):
    scores = iter([1.0, 0.0, 0.0, 0.0, 0.0])
    own = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    options = own | {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    options |= {"compute_metrics": lambda found: {"score": next(scores)}}
    trainer_on(make_examples(22), tmp_path, **options, max_steps=4).train()
    best = trainer_on(make_examples(22), tmp_path / "best", max_steps=2, **own)
    best.train()
    resumed = trainer_on(make_examples(22), tmp_path, **options, nonfinite="skip", max_steps=6)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert resumed.state.best_global_step == 2
    for name, tensor in resumed.model.named_parameters():
        assert torch.equal(tensor, dict(best.model.named_parameters())[name])


def test_another_optimizer_is_no_other_policy(tmp_path):
    trainer_on(make_examples(22), tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = trainer_on(make_examples(22), tmp_path, optim="sgd", nonfinite="skip")
    with pytest.raises(CheckpointError, match=r"These arguments decide.*optim: sgd \(from args\) != adamw_torch"):
        resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_after_rolling_back_no_checkpoint_is_of_steps_that_were_taken_back(tmp_path):
    data = with_bad(64, math.nan, 44)
    options = {"nonfinite": "rollback", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    counts = Counts()
    trainer = trainer_on(data, tmp_path, callbacks=[counts], **options)
    trainer.train()
    assert counts.steps == [*range(1, 12), *range(11, 15)]  # step 12 failed; back to the checkpoint of step 10
    resumed = trainer_on(data, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trainer, resumed)


def test_an_error_right_after_rolling_back_writes_no_mixed_checkpoint(tmp_path):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index == 28:
                raise OSError("the server is gone")
            return with_bad(40, math.nan, 24)[index]

    trainer = trainer_on(Data(), tmp_path, nonfinite="rollback", save_strategy="steps", save_steps=4, max_steps=10)
    with pytest.raises(OSError, match="the server is gone"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    good = trainer_on(
        with_bad(40, math.nan, 24), tmp_path / "good", max_steps=10, save_strategy="steps", save_steps=4, nonfinite="ignore"
    )
    good.train()
    one, two = (loops.load_checkpoint(root / "checkpoint-4", like=state_of(good))[0] for root in (tmp_path, tmp_path / "good"))
    assert all(torch.equal(one.params[name], two.params[name]) for name in two.params)


def state_of(trainer):
    return TrainState.create(trainer.model, trainer.build_step().transform)


def test_an_evaluation_before_the_copy_stays(tmp_path, monkeypatch):
    """The copy is of the state after all that was due at its step, so that a rate which an evaluation moved stays moved."""
    monkeypatch.setattr("fts.trainer.run.nonfinite.COPY_INTERVAL", 3)
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}}
    options |= {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "logging_steps": 1}
    trainer = trainer_on(with_bad(42, math.nan, 33), tmp_path, nonfinite="rollback", max_steps=9, **options)
    trainer.train()
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [3, 6, 9]
    assert rates[7] == pytest.approx(rates[6] / 10)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_labels_that_count_is_named(tmp_path, accumulate):
    pytest.importorskip("transformers")
    from tests.trainer.parity.models import bert, sentences

    for empty in (True, False):
        data = [dict(row, labels=-100 if empty and 8 <= index < 12 else row["labels"]) for index, row in enumerate(sentences())]
        model = bert()
        if not empty:
            model.classifier.weight.data[0] = math.nan
        options = {"gradient_accumulation_steps": accumulate}
        with pytest.raises(NonFiniteError, match=r"0/0 \(a mean over labels of which none counts\)") as caught:
            trainer_on(data, tmp_path, model, **options).train()
        assert ("All labels of a batch of this step are -100" in "".join(caught.value.__notes__)) == empty


def test_labels_that_count():
    def lacks(labels, model=None, names=("labels",)):
        return all_labels_ignored(model or Linear(), {"labels": labels}, names)

    assert lacks(torch.tensor([-100, -100]))
    assert lacks(torch.tensor([[-100], [-100]]))
    assert not lacks(torch.tensor([-100, 1]))
    assert not lacks(torch.tensor([-100.0]))
    assert not lacks([-100])
    assert not lacks(torch.tensor([-100]), names=())
    assert not all_labels_ignored(Linear(), torch.tensor([-100]), ["labels"])
    full, empty = {"labels": torch.tensor([1])}, {"labels": torch.tensor([-100])}
    assert all_labels_ignored(Linear(), steps.MicroBatches([full, empty]), ["labels"])


def test_the_first_token_of_a_causal_model_is_no_label_that_counts():
    pytest.importorskip("transformers")
    from tests.trainer.parity.models import llama

    labels = {"labels": torch.tensor([[5, -100, -100]])}
    assert all_labels_ignored(llama(), labels, ["labels"])
    assert not all_labels_ignored(Linear(), labels, ["labels"])


def test_a_log_has_the_total_of_skipped_updates_as_it_stands(tmp_path):
    trainer = trainer_on(with_bad(), tmp_path, Linear(), nonfinite="skip", logging_steps=5)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["skipped_total"] == 1
    assert not entry.keys() & {"skipped", "skipped_in_a_row"}
