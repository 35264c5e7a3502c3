"""Edge cases: micro-batches without examples, failures inside a step, hooks, modules that change themselves."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.errors import (
    ArgumentError,
    BatchError,
    CompileFallbackWarning,
    DonatedStateError,
    LossError,
    ScheduleError,
    UnknownParameterError,
)

ENGINES = ["module", "func"]


def mean_square(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_micro_batch_without_examples_has_no_weight(engine, as_tensor):
    """Its masked mean is NaN, in the loss, the metrics and the gradients."""

    def loss(params, batch):
        count = batch["mask"].sum()
        mean = ((params["w"] * batch["x"]).square() * batch["mask"]).sum() / count
        return mean, count if as_tensor else int(count), {"mean": mean}

    state = fts.TrainState.create({"w": torch.tensor([2.0])}, tx.identity())
    batch = {"x": torch.tensor([1.0, 3.0, 5.0, 7.0]), "mask": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    value, grads = steps.value_and_grad(loss, engine=engine, accumulate=2)(state, batch)
    expected, expected_grads = steps.value_and_grad(loss, engine=engine)(state, batch)
    torch.testing.assert_close(grads["w"], expected_grads["w"])
    torch.testing.assert_close(value.loss, expected.loss)
    torch.testing.assert_close(value.metrics["mean"], expected.loss)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight", [-1, float("nan")])
def test_an_invalid_weight_is_an_error(engine, weight):
    state = fts.TrainState.create({"w": torch.ones(1)}, tx.identity())
    with pytest.raises(LossError, match="weight"):
        steps.value_and_grad(lambda params, x: (params["w"].sum(), weight), engine=engine)(state, torch.ones(2))


@pytest.mark.parametrize("donate", [False, True])
def test_a_skipped_update_leaves_running_statistics(donate):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    transform = tx.skip_nonfinite(tx.sgd(0.1))
    step = steps.train_step(steps.module_loss(net, mean_square), transform, donate=donate)
    state, _ = step(fts.TrainState.create(net, transform), torch.randn(5, 3))
    before = {name: tensor.clone() for name, tensor in state.buffers.items()}
    state, metrics = step(state, torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]]))
    assert int(metrics["skipped"]) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in state.buffers.items())


def test_a_loss_that_fails_after_its_forward_pass_leaves_a_donated_state_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def loss(model, batch):
        model(batch["x"])
        return batch["missing"]

    state = fts.TrainState.create(net, tx.sgd(0.1))
    with pytest.raises(BatchError):
        steps.train_step(steps.module_loss(net, loss), tx.sgd(0.1), donate=True)(state, {"x": torch.randn(5, 3)})
    assert int(state.buffers["1.num_batches_tracked"]) == 0 and int(state.step) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_an_update_that_fails_consumes_a_donated_state(compiled):
    transform = tx.sgd(lambda step: 0.1 - 0.1 * step)
    step = steps.train_step(lambda params, x: (params["w"] * x).sum(), transform, donate=True)
    step = steps.compile(step, backend="aot_eager") if compiled else step
    state = fts.TrainState.create({"w": torch.ones(2)}, transform)
    for _ in range(2):
        state, _ = step(state, torch.ones(2))
    with pytest.raises(ScheduleError):
        step(state, torch.ones(2))
    with pytest.raises(DonatedStateError):
        state.params  # noqa: B018


def test_hooks_on_parameters_run_in_both_engines_and_stop_compilation():
    net = nn.Linear(2, 1, bias=False)
    net.weight.register_hook(lambda grad: 3 * grad)
    state = fts.TrainState.create(net, tx.sgd(0.1))
    x = torch.ones(1, 2)
    loss = steps.module_loss(net, lambda model, batch: model(batch).sum())
    for engine in ENGINES:
        assert torch.equal(steps.value_and_grad(loss, engine=engine)(state, x)[1]["weight"], torch.full((1, 2), 3.0))
    with pytest.warns(CompileFallbackWarning, match="hook"):
        steps.compile(steps.train_step(loss, tx.sgd(0.1)), backend="eager")(state, x)
    with pytest.raises(ArgumentError, match="hooks"):
        torch.func.grad(lambda p: steps.value_and_grad(loss)(state.replace(params=p), x)[0].loss)(state.params)


class Growing(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(2, 1), what
        self.register_buffer("cache", None)

    def forward(self, x):
        if self.what == "buffer" and self.cache is None:
            self.cache = torch.ones(1)
        if self.what == "parameter" and not hasattr(self, "extra"):
            self.extra = nn.Parameter(torch.ones(1))
        return self.linear(x)


@pytest.mark.parametrize(("what", "name"), [("buffer", "cache"), ("parameter", "extra")])
def test_tensors_registered_in_a_forward_pass_are_named(what, name):
    net = Growing(what)
    state = fts.TrainState.create(net, tx.sgd(0.1))
    with pytest.raises(UnknownParameterError, match=name):
        steps.train_step(steps.module_loss(net, mean_square), tx.sgd(0.1))(state, torch.ones(1, 2))
    assert net.cache is None


def test_one_bad_batch_does_not_stop_compilation():
    step = steps.compile(steps.train_step(lambda params, b: (params["w"] * b["x"]).sum(), tx.sgd(0.1)), backend="eager")
    state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    state, _ = step(state, {"x": torch.ones(2)})
    with pytest.raises(BatchError):
        step(state, {"z": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(state, {"x": torch.ones(2)})
    assert not step.graphs.eager


def test_dropout_that_is_switched_on_later_is_seeded_in_graphs():
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    net[1].eval()
    step = steps.compile(steps.train_step(steps.module_loss(net, mean_square), tx.sgd(0.1)), backend="aot_eager")
    state, x = fts.TrainState.create(net, tx.sgd(0.1)), torch.randn(4, 8)
    step(state, x)
    net.train()
    losses = {float(step(state, x)[1]["loss"]) for _ in range(3)}
    assert len(losses) == 1


def test_a_python_number_that_changes_ends_in_one_warning():
    factor = [1.0]
    step = steps.compile(steps.train_step(lambda params, x: (params["w"] * x).sum() * factor[0], tx.sgd(0.1)), backend="eager")
    state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            state, _ = step(state, torch.ones(2))
            factor[0] += 0.1
    assert [str(w.message) for w in caught if w.category is CompileFallbackWarning and "closure" in str(w.message)]
    assert len([w for w in caught if w.category is CompileFallbackWarning]) == 1


def tiny(name: str):
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11, "intermediate_size": 8}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **dropout))


def test_a_causal_model_weighs_the_labels_that_it_predicts():
    model = tiny("gpt2").double()
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(1, 11, (2, length), generator=generator) for length in (2, 12))
    padded = F.pad(short, (0, 10))
    big = {
        "input_ids": torch.cat([padded, long]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(short), (0, 10)), torch.ones_like(long)]),
        "labels": torch.cat([F.pad(short, (0, 10), value=-100), long]),
    }
    micro = steps.MicroBatches([{"input_ids": part, "labels": part} for part in (short, long)])
    state = fts.TrainState.create(model, tx.identity())
    grad_fn = steps.value_and_grad(steps.module_loss(model))
    (one, grads), (other, expected) = grad_fn(state, micro), grad_fn(state, big)
    torch.testing.assert_close(one.loss, other.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7)  # its loss is in float32


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_hugging_face_models_are_one_graph_and_compiled_once(name):
    model = tiny(name).train()
    ids = torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids if name == "gpt2" else torch.tensor([0, 1])}
    step = steps.compile(steps.train_step(steps.module_loss(model), tx.sgd(0.1)), backend="aot_eager")
    state = fts.TrainState.create(model, tx.sgd(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileFallbackWarning)
        for index in range(3):
            state, _ = step(state, dict(reversed(batch.items())) if index == 2 else batch)
    assert step.recompiles == 0


def test_hugging_face_gradient_checkpointing_works_in_both_engines():
    model = tiny("bert").train()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
    state = fts.TrainState.create(model, tx.identity())
    expected = steps.value_and_grad(steps.module_loss(model))(state, batch)[1]
    model.gradient_checkpointing_enable()
    for engine in ENGINES:
        grads = steps.value_and_grad(steps.module_loss(model), engine=engine)(state, batch)[1]
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name])
