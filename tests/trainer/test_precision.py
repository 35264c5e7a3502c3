"""fp16 and fp8 in the Trainer."""

import logging
import math

import pytest
import torch
from torch import nn

from fts import TrainState, steps, transforms as tx
from fts.errors import ArgumentError, NonFiniteError
from fts.trainer import Trainer, TrainerCallback, TrainingArguments
from fts.trainer.model.float8 import check_float8, convert_to_float8
from tests.trainer.helpers import Regression, arguments, losses, make_examples, make_trainer


class Large(nn.Module):
    """Its gradients overflow float16 by the first scales, and by no smaller one; its first examples say by how much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x, labels=None):
        logits = self.head(self.hidden(x).relu()).squeeze(-1)
        return {"loss": None if labels is None else 100 * (logits.float() - labels).square().mean(), "logits": logits}


class Watching(TrainerCallback):
    """Keeps what a torch user looks at: the norm and the gradients before the update, and the rate."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


FP16 = {"fp16": True, "max_steps": 12, "logging_steps": 1, "learning_rate": 1e-3, "logging_nan_inf_filter": False}


def scales(trainer):
    return [entry["loss_scale"] for entry in trainer.state.log_history if "loss_scale" in entry]


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore", "rollback"])
def test_an_overflow_shrinks_the_scale_and_raises_nothing(tmp_path, nonfinite):
    trainer = make_trainer(tmp_path, Large(), nonfinite=nonfinite, **FP16)
    trainer.train()
    found = scales(trainer)
    assert found[0] == 2.0**16 and 1.0 < found[-1] < 2.0**15 and found == sorted(found, reverse=True)
    assert len(found) == 12 == trainer.state.global_step
    last = trainer.state.log_history[-2]
    assert last["skipped_total"] == math.log2(2.0**16 / found[-1])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


def test_skipped_updates_do_not_count_for_the_schedule_and_norms_are_unscaled(tmp_path):
    trainer = make_trainer(tmp_path, Large(), **FP16)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss_scale" in entry]
    applied = [math.isfinite(entry["grad_norm"]) for entry in log]
    assert 2 < sum(applied) == 12 - log[-1]["skipped_total"] < 12
    for i, entry in enumerate(log):
        assert entry["learning_rate"] == pytest.approx(1e-3 * (12 - sum(applied[:i])) / 12)
    small = make_trainer(
        tmp_path, Large(), step=tx.dynamic_loss_scale(tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.0)), 16.0), **FP16
    )
    full = make_trainer(tmp_path, Large(), step=tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.0)), max_steps=12, logging_steps=1)
    found, expected = [], []
    for each, norms in ((small, found), (full, expected)):
        each.train()
        norms += [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry]
    assert found == pytest.approx(expected, rel=1e-2)


def test_callbacks_see_gradients_without_the_scale(tmp_path):
    seen = Watching()
    trainer = make_trainer(tmp_path, Large(), callbacks=[seen], max_grad_norm=0.0, **FP16)
    trainer.train()
    log = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    applied = [i for i, norm in enumerate(log) if math.isfinite(norm)]
    assert applied and [seen.norms[i] for i in applied] == pytest.approx([log[i] for i in applied], rel=1e-5)


@pytest.mark.parametrize("own", ["given", "named"])
def test_torch_optimizers(tmp_path, own):
    model = Large()
    if own == "given":
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
        trainer = make_trainer(tmp_path, model, optimizers=(optimizer, schedule), **FP16)
    else:
        trainer = make_trainer(tmp_path, model, optim="rmsprop", **FP16)
    seen = Watching()
    trainer.add_callback(seen)
    trainer.train()
    skipped = int(trainer.state.log_history[-2]["skipped_total"])
    assert skipped > 0 and losses(trainer)[-1] < losses(trainer)[0] * 2
    if own == "given":  # the schedule waits where the update was skipped, as transformers' does
        assert seen.rates[-1] == pytest.approx(1e-3 * (1 - (12 - skipped) / 12))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, compiled):
    options = {**FP16, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    if compiled:
        options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    full = make_trainer(tmp_path / "full", Large(), **options)
    full.train()
    for step in (3, 9):  # while the scale falls, and after
        again = make_trainer(tmp_path / f"again-{step}", Large(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "full" / f"checkpoint-{step}"))
        assert scales(again) == scales(full)
        assert losses(again) == losses(full)
        for one, two in zip(again.model.parameters(), full.model.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"fp16": False}, {"fp16": True}),
        ({"fp16": True}, {"fp16": False}),
        ({"fp16": True}, {"fp16": False, "nonfinite": "skip"}),
        ({"fp16": False, "nonfinite": "skip"}, {"fp16": True}),
    ],
)
def test_a_run_resumes_in_another_precision(tmp_path, caplog, before, after):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 1}
    make_trainer(tmp_path, **options, **before).train()
    again = make_trainer(tmp_path / "again", **options, **after)
    with caplog.at_level(logging.INFO, "fts.trainer.checkpoints.train_state"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 8
    assert ("The loss scale begins at 65536" in caplog.text) == after["fp16"]
    assert scales(again)[:1] == [2.0**16] and len(scales(again)) == 4  # in the log of both, or of this run alone


def test_a_loss_that_is_not_finite_raises_as_ever(tmp_path):
    bad = make_examples(22)
    bad[17]["labels"] = math.nan
    trainer = make_trainer(tmp_path, Regression(dropout=0.0), train_dataset=bad, **FP16)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        trainer.train()


def test_float16_weights_are_an_error(tmp_path):
    trainer = make_trainer(tmp_path, Regression().half(), **FP16)
    with pytest.raises(ArgumentError, match=r"keeps the trained weights in float32, but hidden.weight.*dtype=torch.float32"):
        trainer.train()


# ---- what a subclass brings


def own_step(call):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            assert torch.is_autocast_enabled("cpu") is False
            call(self, loss)
            return loss.detach()

    return Own


def trained(kind, tmp_path, **changes):
    trainer = kind(Large(), arguments(tmp_path, **{**FP16, **changes}), train_dataset=make_examples(22))
    trainer.train()
    return trainer


def test_a_training_step_of_ones_own_is_scaled_by_accelerate(tmp_path):
    usual = trained(Trainer, tmp_path)
    own = trained(own_step(lambda self, loss: self.accelerator.backward(loss)), tmp_path)
    assert losses(own) == pytest.approx(losses(usual), rel=1e-6)
    assert scales(own) == scales(usual) and scales(own)[-1] < 2.0**16


def test_super_of_the_training_step_is_scaled(tmp_path):
    class Super(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    usual = trained(Trainer, tmp_path, gradient_accumulation_steps=2)
    assert losses(trained(Super, tmp_path, gradient_accumulation_steps=2)) == pytest.approx(losses(usual), rel=1e-6)


def test_backward_without_accelerate_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match=r"did not scale its loss.*accelerator.backward\(loss\)"):
        trained(own_step(lambda self, loss: loss.backward()), tmp_path)


def test_an_own_loss_and_an_own_context(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            assert outputs["logits"].dtype == torch.float16
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        def compute_loss_context_manager(self):
            return torch.autocast("cpu", torch.float16)

    assert losses(trained(Own, tmp_path)) == pytest.approx(losses(trained(Trainer, tmp_path)), rel=1e-6)


def test_transforms_and_steps_of_ones_own(tmp_path):
    def run(step, model):
        trainer = Trainer(model, arguments(tmp_path, **FP16), train_dataset=make_examples(22), step=step)
        trainer.train()
        return scales(trainer)

    assert run(tx.sgd(1e-4), Large())[0] == 2.0**16  # wrapped
    assert run(tx.dynamic_loss_scale(tx.sgd(1e-4), 8.0), Large())[0] == 8.0  # the user's own
    assert run(tx.master_weights(tx.dynamic_loss_scale(tx.sgd(1e-4), 4.0)), Large())[0] == 4.0
    model = Large()
    full = steps.train_step(steps.module_loss(model), tx.dynamic_loss_scale(tx.sgd(1e-4), 16.0), precision="fp16")
    assert run(full, model)[0] == 16.0
    with pytest.raises(ArgumentError, match=r"fp16=True cannot be added to a complete step.*tx.dynamic_loss_scale"):
        run(steps.train_step(steps.module_loss(model), tx.sgd(1e-4)), model)


def test_the_launcher_may_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    trainer = make_trainer(tmp_path, Large(), max_steps=2, logging_steps=1)
    trainer.train()
    assert scales(trainer)[0] == 2.0**16


def test_evaluation_computes_in_float16(tmp_path):
    seen = []

    class Looking(Large):
        def forward(self, x, labels=None):
            out = super().forward(x, labels)
            seen.append((out["logits"].dtype, self.head.weight.dtype))
            return out

    make_trainer(tmp_path, Looking(), fp16=True).evaluate()
    assert set(seen) == {(torch.float16, torch.float32)}
    seen.clear()
    trainer = make_trainer(tmp_path, Looking(), fp16=True, bf16_full_eval=True)
    metrics = trainer.evaluate()
    assert {weight for _, weight in seen} == {torch.bfloat16} and math.isfinite(metrics["eval_loss"])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# ---- float8


def test_float8_names_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(
        ArgumentError, match=r"'fp8' .*needs an NVIDIA GPU that multiplies in float8.*on the device 'cpu'. Use bf16"
    ):
        make_trainer(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        check_float8(torch.device("cuda"))


def test_a_precision_that_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "int4")
    with pytest.raises(ArgumentError, match="ACCELERATE_MIXED_PRECISION='int4' is unknown"):
        make_trainer(tmp_path)
    assert TrainingArguments(bf16=True).mixed_precision == "bf16"


class Four(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 20), nn.Linear(20, 16), nn.Linear(16, 16))


def test_layers_that_fit_multiply_in_float8():
    """On a CPU torchao can only imitate it: numbers are rounded to float8 and multiplied in float32."""
    float8 = pytest.importorskip("torchao.float8")
    model, plain = Four(), Four()
    assert convert_to_float8(model, float8.Float8LinearConfig(emulate=True)) is model
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Linear", "Float8Linear", "Linear", "Linear", "Linear"]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), plain.parameters(), strict=True))
    x = torch.randn(16, 16)
    step = lambda net: steps.value_and_grad(steps.module_loss(net, lambda m, x: m(x).square().mean()))  # noqa: E731
    value, grads = step(model)(TrainState.create(model, tx.sgd(0.1)), x)
    expected, slopes = step(plain)(TrainState.create(plain, tx.sgd(0.1)), x)
    assert value.loss.item() == pytest.approx(expected.loss.item(), rel=0.1) and value.loss != expected.loss
    for name, slope in slopes.items():
        assert (grads[name] - slope).norm() < 0.2 * slope.norm()
