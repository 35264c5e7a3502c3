"""Gradients of both engines against `loss.backward()` by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fts
from fts import steps, transforms as tx
from fts.errors import ArgumentError, BatchError, LossError, UnknownParameterError

ENGINES = ["module", "func"]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.0), nn.Linear(7, 3))


def make_batch(batch_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch_size)
    return {"x": torch.randn(batch_size, 5, generator=generator), "y": torch.randint(0, 3, (batch_size,), generator=generator)}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def by_hand(module: nn.Module, loss_of) -> dict[str, torch.Tensor]:
    """Gradients of a copy of a module by `loss.backward()`."""
    module = copy.deepcopy(module)
    loss_of(module).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def fingerprint(module: nn.Module) -> list:
    tensors = [*module.parameters(), *module.buffers()]
    return [(id(t), t.data_ptr(), t.requires_grad, t.detach().clone(), t.grad) for t in tensors] + [
        m.training for m in module.modules()
    ]


def assert_untouched(module: nn.Module, before: list) -> None:
    for old, new in zip(before, fingerprint(module), strict=True):
        if isinstance(old, tuple):
            assert old[:3] == new[:3]
            assert torch.equal(old[3], new[3])
            assert old[4] is new[4]
        else:
            assert old == new


def assert_same(grads, expected, **tolerance) -> None:
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], **tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_equal_backward_and_the_module_is_untouched(engine):
    net = classifier()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    state = fts.TrainState.create(net, tx.identity())
    before = fingerprint(net)
    batch = make_batch(6)
    value, grads = steps.value_and_grad(steps.module_loss(net, cross_entropy), engine=engine)(state, batch)
    assert_untouched(net, before)
    net.zero_grad()
    assert_same(grads, by_hand(net, lambda module: cross_entropy(module, batch)))
    reference = copy.deepcopy(net)
    cross_entropy(reference, batch)
    assert_same(value.buffers, dict(reference.named_buffers()))
    assert_same(state.buffers, dict(net.named_buffers()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [8, 10])
def test_accumulated_gradients_equal_the_big_batch(engine, batch_size):
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    batch = make_batch(batch_size)
    batch["x"] = batch["x"].double()
    state = fts.TrainState.create(net, tx.identity())
    loss = steps.module_loss(net, lambda model, batch: (cross_entropy(model, batch), {"mean": batch["x"].mean()}))
    value, grads = steps.value_and_grad(loss, engine=engine, accumulate=4)(state, batch)
    full, expected = steps.value_and_grad(loss, engine=engine)(state, batch)
    assert_same(grads, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(value.loss, full.loss)
    torch.testing.assert_close(value.metrics["mean"], batch["x"].mean())
    assert value.weight == batch_size


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_unequal_token_counts_are_weighted(engine, as_tensor):
    net = nn.Linear(5, 3).double()

    def token_mean(model, batch):
        losses = F.cross_entropy(model(batch["x"].double()), batch["y"], reduction="none")
        count = batch["mask"].sum()
        return (losses * batch["mask"]).sum() / count, count if as_tensor else int(count)

    batch = make_batch(9) | {"mask": torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 1])}
    state = fts.TrainState.create(net, tx.identity())
    loss = steps.module_loss(net, token_mean)
    value, grads = steps.value_and_grad(loss, engine=engine, accumulate=3)(state, batch)
    full, expected = steps.value_and_grad(loss, engine=engine)(state, batch)
    assert_same(grads, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(value.loss, full.loss)
    assert float(value.weight) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_have_weight_one_unless_the_loss_returns_one(engine):
    def loss(params, batch):
        return (params["w"] * batch).mean()

    state = fts.TrainState.create({"w": torch.tensor([1.0])}, tx.identity())
    micro = steps.MicroBatches([torch.tensor([1.0]), torch.tensor([2.0, 4.0])])
    value, grads = steps.value_and_grad(loss, engine=engine)(state, micro)
    assert float(grads["w"]) == pytest.approx((1 + 3) / 2)
    assert float(value.loss) == pytest.approx(2)
    weighted = steps.value_and_grad(lambda params, batch: (loss(params, batch), len(batch)), engine=engine)
    assert float(weighted(state, micro)[1]["w"]) == pytest.approx((1 + 2 + 4) / 3)


def test_a_micro_batch_without_examples_has_no_weight():
    def loss(params, batch):
        return (params["w"] * batch).sum() / len(batch), len(batch)

    state = fts.TrainState.create({"w": torch.tensor([1.0])}, tx.identity())
    micro = steps.MicroBatches([torch.tensor([]), torch.tensor([2.0, 4.0])])
    value, grads = steps.value_and_grad(loss)(state, micro)
    assert float(grads["w"]) == 3 and float(value.loss) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_have_their_own_weights(engine):
    def loss(params, batch):
        return (params["w"] * batch).mean(), {"max": (batch.max(), 1), "plain": batch.mean(), "number": 2.0}

    state = fts.TrainState.create({"w": torch.tensor([1.0])}, tx.identity())
    value, _ = steps.value_and_grad(loss, engine=engine, accumulate=2)(state, torch.tensor([1.0, 2.0, 6.0]))
    assert {name: float(metric) for name, metric in value.metrics.items()} == {"max": 4.0, "plain": 3.0, "number": 2.0}
    assert all(isinstance(metric, torch.Tensor) and metric.ndim == 0 for metric in value.metrics.values())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.reentrant = reentrant

    def forward(self, x):
        hidden = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=self.reentrant)
        return self.second(hidden)


@pytest.mark.parametrize(("engine", "reentrant"), [("module", False), ("module", True), ("func", False), ("func", True)])
def test_activation_checkpointing(engine, reentrant):
    net = Checkpointed(reentrant)
    batch = make_batch(4)
    batch["x"].requires_grad_(reentrant)
    state = fts.TrainState.create(net, tx.identity())
    state = state.replace(params={name: tensor + 0.3 for name, tensor in state.params.items()})
    before = fingerprint(net)
    _, grads = steps.value_and_grad(steps.module_loss(net, cross_entropy), engine=engine)(state, batch)
    assert_untouched(net, before)
    moved = state.apply_to(copy.deepcopy(net))
    assert_same(grads, by_hand(moved, lambda module: cross_entropy(module, batch)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids):
        return self.out(self.embedding(ids) * self.scale)


@pytest.mark.parametrize("engine", ENGINES)
def test_tied_weights_and_non_persistent_buffers(engine, tmp_path):
    net = Tied()
    ids = torch.arange(6)

    def loss(model, batch):
        return F.cross_entropy(model(batch), batch.flip(0))

    state = fts.TrainState.create(net, tx.identity())
    assert list(state.params) == ["embedding.weight"]
    assert state.metadata.ties == (("out.weight", "embedding.weight"),)
    state = state.replace(params={name: tensor * 1.5 for name, tensor in state.params.items()})
    _, grads = steps.value_and_grad(steps.module_loss(net, loss), engine=engine)(state, ids)
    moved = state.apply_to(copy.deepcopy(net))
    assert moved.out.weight is moved.embedding.weight
    assert_same(grads, by_hand(moved, lambda module: loss(module, ids)))
    loaded = fts.TrainState.load(state.save(tmp_path), like=fts.TrainState.create(Tied(), tx.identity()))
    assert torch.equal(loaded.params["embedding.weight"], state.params["embedding.weight"])
    assert torch.equal(loaded.buffers["scale"], torch.tensor(2.0))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(engine, cell):
    net = cell(5, 4, num_layers=2, batch_first=True)
    x = torch.randn(2, 3, 5)
    state = fts.TrainState.create(net, tx.identity())
    state = state.replace(params={name: tensor + 0.1 for name, tensor in state.params.items()})

    def loss(model, batch):
        return model(batch)[0].square().mean()

    _, grads = steps.value_and_grad(steps.module_loss(net, loss), engine=engine)(state, x)
    assert_same(grads, by_hand(state.apply_to(copy.deepcopy(net)), lambda module: loss(module, x)))


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_stay(engine):
    net = classifier()
    net[0].requires_grad_(False)
    state = fts.TrainState.create(net, tx.identity())
    assert sorted(state.frozen) == ["0.bias", "0.weight"]
    batch = make_batch(6)
    _, grads = steps.value_and_grad(steps.module_loss(net, cross_entropy), engine=engine)(state, batch)
    assert_same(grads, by_hand(net, lambda module: cross_entropy(module, batch)))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_in_a_loss_is_the_module_itself(engine):
    net = nn.ModuleDict({"encoder": nn.Linear(5, 2), "decoder": nn.Linear(2, 5)})
    x = torch.randn(3, 5)

    def loss(model, batch):
        penalty = model["encoder"].weight.square().sum()
        return (model["decoder"](model["encoder"](batch)) - batch).square().mean() + penalty

    state = fts.TrainState.create(net, tx.identity())
    state = state.replace(params={name: tensor + 0.2 for name, tensor in state.params.items()})
    _, grads = steps.value_and_grad(steps.module_loss(net, loss), engine=engine)(state, x)
    assert_same(grads, by_hand(state.apply_to(copy.deepcopy(net)), lambda module: loss(module, x)))


@pytest.mark.parametrize("engine", ENGINES)
def test_randomness_is_a_function_of_seed_step_and_micro_batch(engine):
    def loss(params, batch):
        return (params["w"] * torch.randn(())).sum()

    state = fts.TrainState.create({"w": torch.tensor([1.0])}, tx.identity(), seed=3)
    grad_fn = steps.value_and_grad(loss, engine=engine)

    def draw(state, batch=None):
        torch.rand(5)  # must not matter
        return float(grad_fn(state, torch.ones(1) if batch is None else batch)[1]["w"])

    assert draw(state) == draw(state)
    assert draw(state) != draw(state.replace(step=state.step + 1))
    assert draw(state) != draw(state.replace(seed=4))
    two = draw(state, steps.MicroBatches([torch.ones(1), torch.ones(1)]))
    assert two != draw(state)


def test_further_arguments_are_passed_to_the_loss():
    state = fts.TrainState.create({"w": torch.ones(3)}, tx.identity())
    teacher = {"w": torch.arange(3.0)}
    grad_fn = steps.value_and_grad(lambda params, batch, teacher: (params["w"] * teacher["w"] * batch.mean()).sum(), accumulate=2)
    _, grads = grad_fn(state, torch.ones(4), teacher)
    assert torch.equal(grads["w"], teacher["w"])


def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32():
    seen = []

    def loss(model, batch):
        out = model(batch)
        seen.append(out.dtype)
        return out.float().square().mean()

    net = nn.Linear(4, 4)
    state = fts.TrainState.create(net, tx.identity())
    for engine in ENGINES:
        _, grads = steps.value_and_grad(steps.module_loss(net, loss), engine=engine, precision="bf16")(state, torch.ones(2, 4))
        assert grads["weight"].dtype == torch.float32
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_key_is_named(engine):
    net = classifier()
    state = fts.TrainState.create(net, tx.identity())
    with pytest.raises(BatchError, match=r"batch\['y'\].*\['x'\]"):
        steps.value_and_grad(steps.module_loss(net, cross_entropy), engine=engine)(state, {"x": torch.zeros(2, 5)})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w: w * torch.ones(2), r"shape \[2\]"),
        (lambda w: 3.0, "returned float"),
        (lambda w: (w.sum(), {"a": torch.ones(3)}), r"'a'.*shape \[3\]"),
        (lambda w: (w.sum(), {"loss": w.sum()}), "named 'loss'"),
        (lambda w: (w.sum(), torch.ones(2, 2)), r"weight.*\[2, 2\]"),
        (lambda w: w.sum().long(), "floating-point"),
    ],
)
def test_a_bad_loss_is_explained(engine, result, message):
    state = fts.TrainState.create({"w": torch.ones(1)}, tx.identity())
    with pytest.raises(LossError, match=message):
        steps.value_and_grad(lambda params, batch: result(params["w"]), engine=engine)(state, torch.ones(2))


def test_a_loss_without_gradient_is_explained():
    state = fts.TrainState.create({"w": torch.ones(1)}, tx.identity())
    with pytest.raises(LossError, match="does not depend"):
        steps.value_and_grad(lambda params, batch: batch.sum())(state, torch.ones(2))


def test_a_state_of_another_module_is_refused():
    state = fts.TrainState.create(nn.Linear(2, 2, bias=False), tx.identity())
    with pytest.raises(UnknownParameterError, match="bias"):
        steps.value_and_grad(steps.module_loss(nn.Linear(2, 2), lambda model, batch: model(batch).sum()))(state, torch.ones(1, 2))


@pytest.mark.parametrize(
    "arguments", [{"engine": "jit"}, {"accumulate": 0}, {"accumulate": 1.5}, {"precision": "fp8"}, {"precision": "int3"}]
)
def test_bad_arguments_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ArgumentError, match=name):
        steps.value_and_grad(lambda params, batch: batch, **arguments)


def test_bad_losses_are_refused_at_construction():
    with pytest.raises(ArgumentError, match="module_loss"):
        steps.value_and_grad(nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match="two arguments"):
        steps.value_and_grad(lambda batch: batch)
    with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
        steps.module_loss(cross_entropy)


def test_a_failing_forward_restores_the_module():
    net = classifier()
    state = fts.TrainState.create(net, tx.identity())
    before = fingerprint(net)
    for engine in ENGINES:
        with pytest.raises(RuntimeError):
            steps.value_and_grad(steps.module_loss(net, cross_entropy), engine=engine)(state, {"x": torch.zeros(2, 4), "y": None})
        assert_untouched(net, before)


def test_train_mode_follows_the_root():
    net = classifier()
    net[1].eval()
    state = fts.TrainState.create(net, tx.identity())
    grad_fn = steps.value_and_grad(steps.module_loss(net, cross_entropy))
    assert torch.equal(grad_fn(state, make_batch(6))[0].buffers["1.num_batches_tracked"], torch.tensor(0))
    net.eval()
    assert torch.equal(grad_fn(state, make_batch(6))[0].buffers["1.num_batches_tracked"], torch.tensor(1))
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_share_no_memory(engine):
    params = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(2)}
    state = fts.TrainState.create(params, tx.identity())
    _, grads = steps.value_and_grad(lambda p, x: ((p["a"] + p["b"]) * x).sum() + p["c"].sum(), engine=engine)(
        state, torch.ones(3)
    )
    for grad in grads.values():
        grad.mul_(2)
    assert [grad.tolist() for grad in grads.values()] == [[2.0] * 3, [2.0] * 3, [2.0] * 2]
