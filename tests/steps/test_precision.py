"""Loss scaling in float16, activation offloading, and parameters in 16 bits."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fts
from fts import steps, transforms as tx
from fts.errors import ArgumentError, CompileFallbackWarning, NonFiniteError
from fts.steps import activation_offloading

ENGINES = ["module", "func"]
SCALE = {"init_scale": 2.0**12, "growth_interval": 3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.norm(torch.relu(self.first(x))))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"]) * batch["times"].mean()


def batches(count, batch_size=8, overflow=()):
    """In those of `overflow` the loss is so large that its gradients overflow by the scale."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(batch_size, 6, generator=generator),
            "y": torch.randint(4, (batch_size,), generator=generator),
            "times": torch.full((batch_size,), 1e4 if i in overflow else 1.0),
        }
        for i in range(count)
    ]


def optimizer(**options):
    return tx.dynamic_loss_scale(tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.01)), **{**SCALE, **options})


def by_torch(data, accumulate=1):
    """The loop of torch's documentation."""
    net, scaler = Net(), torch.amp.GradScaler("cpu", **SCALE)
    adamw = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    losses, scales = [], []
    for batch in data:
        scales.append(scaler._init_scale if scaler._scale is None else scaler.get_scale())
        total = 0.0
        for part in steps.split_microbatches(batch, accumulate):
            with torch.autocast("cpu", torch.float16):
                loss = loss_fn(net, part) / accumulate
            scaler.scale(loss).backward()
            total += loss.item()
        losses.append(total)
        scaler.unscale_(adamw)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad()
    return net, losses, scales


def run(step, state, data):
    found = []
    for batch in data:
        state, metrics = step(state, batch)
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("donate", [False, True])
def test_training_equals_that_with_torchs_scaler(engine, donate, accumulate):
    data, net = batches(12, overflow=(0, 5)), Net()
    expected, losses, scales = by_torch(data, accumulate)
    transform = optimizer()
    step = steps.train_step(
        steps.module_loss(net, loss_fn), transform, precision="fp16", engine=engine, accumulate=accumulate, donate=donate
    )
    state, found = run(step, fts.TrainState.create(net, transform), data)
    assert [row["loss_scale"] for row in found] == scales
    assert len(set(scales)) > 1 and any(row["skipped"] for row in found)
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-5)  # not multiplied
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(state.params[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert all(row["grad_norm"] < 100 for row in found if not row["skipped"])  # of unscaled gradients


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled(accumulate):
    data, net, transform = batches(8, overflow=(0, 4)), Net(), optimizer()
    step = steps.train_step(steps.module_loss(net, loss_fn), transform, precision="fp16", engine="func", accumulate=accumulate)
    eager, expected = run(step, fts.TrainState.create(net, transform), data)
    for donate in (False, True):
        compiled = steps.compile(step, backend="eager", donate=donate)
        state, found = run(compiled, fts.TrainState.create(net, transform), data)
        assert compiled.recompiles == 0
        assert [row["loss_scale"] for row in found] == [row["loss_scale"] for row in expected]
        for one, two in zip(found, expected, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        for name, parameter in eager.params.items():
            torch.testing.assert_close(state.params[name], parameter, rtol=1e-4, atol=1e-5)


def test_inside_inductors_graph():
    data, net, transform = batches(4), Net(), optimizer()
    step = steps.train_step(steps.module_loss(net, loss_fn), transform, precision="fp16")
    eager, expected = run(step, fts.TrainState.create(net, transform), data)
    state, found = run(steps.compile(step), fts.TrainState.create(net, transform), data)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-2)
    assert float(tx.loss_scale(state.opt_state)) == float(tx.loss_scale(eager.opt_state))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_is_scaled_in_every_precision(engine):
    """Otherwise gradients would be divided by a scale that did not multiply them."""
    data, net = batches(6), Net()
    plain = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.01))
    for precision in (None, "bf16"):
        options = {"engine": engine, "precision": precision, "accumulate": 2}
        loss = steps.module_loss(net, loss_fn)
        expected, _ = run(steps.train_step(loss, plain, **options), fts.TrainState.create(net, plain), data)
        found, _ = run(steps.train_step(loss, optimizer(), **options), fts.TrainState.create(net, optimizer()), data)
        for name, parameter in expected.params.items():
            torch.testing.assert_close(found.params[name], parameter, rtol=1e-4, atol=1e-5)


def test_small_gradients_arrive():
    """2**-30 underflows in float16; multiplied by the scale it does not."""
    net = nn.Linear(4, 1, bias=False)
    x = torch.full((1, 4), 2.0**-15)

    def tiny(model, batch):
        return (model(batch).float() * 2.0**-15).sum()

    def grads_of(transform, precision):
        step = steps.train_step(steps.module_loss(net, tiny), transform, precision=precision)
        return steps.compute_gradients(step, fts.TrainState.create(net, transform), x)[1]["weight"]

    assert torch.equal(grads_of(tx.dynamic_loss_scale(tx.sgd(0.1)), "fp16"), torch.full((1, 4), 2.0**-30))
    assert torch.equal(grads_of(tx.dynamic_loss_scale(tx.sgd(0.1), 1.0), "fp16"), torch.zeros(1, 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_without_a_scale_is_an_error(engine):
    net, transform = Net(), tx.adamw(0.01)
    step = steps.train_step(steps.module_loss(net, loss_fn), transform, precision="fp16", engine=engine)
    for each in (step, steps.compile(step, backend="eager")):
        with pytest.raises(ArgumentError, match=r"needs a loss scale.*tx.dynamic_loss_scale\(tx.adamw"):
            each(fts.TrainState.create(net, transform), batches(1)[0])
    value = steps.eval_step(steps.module_loss(net, loss_fn), precision="fp16")(
        fts.TrainState.create(net, transform), batches(1)[0]
    )
    assert value["loss"][0].isfinite()  # an evaluation has no gradients


def test_a_transform_that_uses_scaled_gradients_is_an_error():
    wrong = tx.chain(tx.clip_by_global_norm(1.0), tx.dynamic_loss_scale(tx.adamw(0.01)))
    net = Net()
    for make in (
        lambda: steps.train_step(steps.module_loss(net, loss_fn), wrong, precision="fp16"),
        lambda: steps.gradient_step(steps.value_and_grad(steps.module_loss(net, loss_fn)), wrong),
    ):
        with pytest.raises(ArgumentError, match="stands inside chain"):
            make()


# ---- checked gradients


def test_the_gradient_callback_gets_unscaled_gradients():
    net, data = Net(), batches(3)
    seen = []

    def halve(grads):
        seen.append({name: g.clone() for name, g in grads.items()})
        for name in grads:
            grads[name] = grads[name] / 2

    plain = tx.sgd(0.1)
    step = steps.train_step(steps.module_loss(net, loss_fn), plain)
    expected, _ = run(steps.with_gradient_callback(step, halve), fts.TrainState.create(net, plain), data)
    without, seen = seen, []
    scaled = tx.dynamic_loss_scale(plain)
    step = steps.train_step(steps.module_loss(net, loss_fn), scaled)
    found, _ = run(steps.with_gradient_callback(step, halve), fts.TrainState.create(net, scaled), data)
    torch.testing.assert_close(seen, without)
    torch.testing.assert_close(found.params, expected.params)


@pytest.mark.parametrize(
    "careful",
    [steps.with_nonfinite_check, steps.check_after_step, lambda s: steps.check_after_step(steps.compile(s, backend="eager"))],
)
def test_an_overflow_by_the_scale_raises_nothing_and_a_bad_loss_does(careful):
    net, data, transform = Net(), batches(4, overflow=(0, 1)), optimizer()
    step = careful(steps.train_step(steps.module_loss(net, loss_fn), transform, precision="fp16"))
    state, found = run(step, fts.TrainState.create(net, transform), data)
    assert any(row["skipped"] for row in found)
    bad = {**data[0], "times": torch.full((8,), math.nan)}
    with pytest.raises(NonFiniteError, match=r"loss (is|=) nan"):
        step(state, bad)


# ---- manual backward


def own(scaler, call):
    def fn(model, batch):
        with torch.autocast("cpu", torch.float16):
            loss = loss_fn(model, batch)
        call(scaler, loss).backward()
        return loss

    return fn


def test_manual_backward_is_scaled():
    net, data, transform = Net(), batches(6, overflow=(0,)), optimizer()
    expected, _ = run(
        steps.train_step(steps.module_loss(net, loss_fn), transform, precision="fp16"),
        fts.TrainState.create(net, transform),
        data,
    )
    scaler = steps.LossScaler()
    gradients = steps.manual_backward(net, own(scaler, lambda scaler, loss: scaler.scale(loss)), scaler=scaler)
    found, _ = run(steps.gradient_step(gradients, transform), fts.TrainState.create(net, transform), data)
    torch.testing.assert_close(found.params, expected.params, rtol=0, atol=0)
    plain = tx.adamw(0.01)  # without a scale nothing is multiplied
    state, _ = run(steps.gradient_step(gradients, plain), fts.TrainState.create(net, plain), data[1:])
    assert all(tensor.isfinite().all() for tensor in state.params.values())


def test_manual_backward_without_the_scale_is_an_error():
    net, (batch,), transform = Net(), batches(1), optimizer()
    state, scaler = fts.TrainState.create(net, transform), steps.LossScaler()
    unscaled = own(scaler, lambda scaler, loss: loss)
    with pytest.raises(ArgumentError, match=r"scaler = steps.LossScaler\(\)"):
        steps.gradient_step(steps.manual_backward(net, unscaled), transform)(state, batch)
    with pytest.raises(ArgumentError, match=r"did not scale its loss.*accelerator.backward\(loss\)"):
        steps.gradient_step(steps.manual_backward(net, unscaled, scaler=scaler), transform)(state, batch)


# ---- activations


class Checkpointed(Net):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        hidden = checkpoint(lambda x: self.norm(torch.relu(self.first(x))), x.requires_grad_(), use_reentrant=self.reentrant)
        return self.last(hidden)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_activations_are_recomputed_in_float16(engine, reentrant):
    data, results = batches(4, overflow=(0,)), []
    for net in (Net(), Checkpointed(reentrant)):
        loss = steps.module_loss(net, loss_fn)
        step = steps.train_step(loss, optimizer(), precision="fp16", engine=engine, accumulate=2)
        results.append(run(step, fts.TrainState.create(net, optimizer()), data))
    torch.testing.assert_close(results[0][0].params, results[1][0].params, rtol=1e-6, atol=1e-7)
    assert [row["loss"] for row in results[1][1]] == pytest.approx([row["loss"] for row in results[0][1]], rel=1e-6)


def record_offloaded(monkeypatch):
    """Record the shapes of the tensors that are copied to the CPU."""
    shapes = []
    original = activation_offloading._make_pack_hook

    def make_pack_hook(min_numel):
        pack = original(min_numel)

        def recording_pack(tensor):
            packed = pack(tensor)
            if isinstance(packed, tuple):
                shapes.append(tuple(tensor.shape))
            return packed

        return recording_pack

    monkeypatch.setattr(activation_offloading, "_make_pack_hook", make_pack_hook)
    return shapes


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_activations_on_the_cpu_give_equal_gradients(monkeypatch, engine, accumulate, precision):
    net, (batch,), transform = Net(), batches(1, batch_size=64), optimizer()
    state = fts.TrainState.create(net, transform)
    options = {"engine": engine, "accumulate": accumulate, "precision": precision}
    loss = steps.module_loss(net, loss_fn)
    value, grads = steps.value_and_grad(loss, **options)(state, batch)
    shapes = record_offloaded(monkeypatch)
    offloaded, found = steps.value_and_grad(steps.offload_activations(loss, min_numel=100), **options)(state, batch)
    assert offloaded.loss == value.loss and offloaded.weight == value.weight
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-7)
    batch_size = 64 // accumulate
    assert (batch_size, 16) in shapes  # hidden values
    weights = {tuple(p.shape) for p in net.parameters()}
    assert precision == "fp16" or not weights & set(shapes)  # autocast copies weights to float16


def test_activations_of_plain_losses_and_models_own_losses(monkeypatch):
    shapes = record_offloaded(monkeypatch)
    state = fts.TrainState.create({"w": torch.randn(40, 40)}, tx.identity())

    def plain(params, batch):
        return torch.tanh(batch @ params["w"]).square().mean(), 3

    x = torch.randn(50, 40)
    value, grads = steps.value_and_grad(plain)(state, x)
    offloaded, found = steps.value_and_grad(steps.offload_activations(plain))(state, x)
    assert torch.equal(found["w"], grads["w"]) and (offloaded.loss, offloaded.weight) == (value.loss, 3)
    assert (50, 40) in shapes and (40, 40) not in shapes

    class Own(nn.Linear):
        def forward(self, x, labels):
            return {"loss": torch.tanh(super().forward(x)).square().mean()}

    net = Own(40, 40)
    batch = {"x": x, "labels": torch.tensor([[1, -100, 3]])}
    loss = steps.offload_activations(steps.module_loss(net))
    value, _ = steps.value_and_grad(loss)(fts.TrainState.create(net, tx.identity()), batch)
    assert value.weight == 2  # number of label tokens
    with pytest.raises(ArgumentError, match="offload_activations needs a function"):
        steps.offload_activations(3)


def test_activations_in_a_graph_stay_where_they_are():
    net, (batch,) = Net(), batches(1)
    step = steps.train_step(steps.offload_activations(steps.module_loss(net, loss_fn)), tx.sgd(0.1))
    with pytest.warns(CompileFallbackWarning, match="runs eagerly"):
        state, _ = steps.compile(step, backend="eager")(fts.TrainState.create(net, tx.sgd(0.1)), batch)
    assert all(tensor.isfinite().all() for tensor in state.params.values())


# ---- parameters in 16 bits


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_micro_batches_do_not_overflow(dtype, engine, tensors):
    """A gradient of 500 times 1000 tokens overflows in float16; their mean is 500."""
    params = {"w": torch.zeros(3, dtype=dtype)}
    counts, slopes = [500, 1_000, 0, 3_000], [100.0, 500.0, math.nan, 750.0]

    def loss(params, batch):
        return (params["w"].float() * batch["slope"]).sum(), batch["count"] if tensors else int(batch["count"])

    micro = steps.MicroBatches(
        {"slope": torch.tensor(slope), "count": torch.tensor(count)} for slope, count in zip(slopes, counts, strict=True)
    )
    state = fts.TrainState.create(params, tx.identity())
    value, grads = steps.value_and_grad(loss, engine=engine)(state, micro)
    mean = sum(c * s for c, s in zip(counts, slopes, strict=True) if c) / sum(counts)
    assert grads["w"].dtype == dtype
    assert grads["w"].float().tolist() == pytest.approx([mean] * 3, rel=2e-3 if dtype == torch.float16 else 2e-2)
    assert value.weight == sum(counts)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("around", [tx.master_weights, tx.stochastic_rounding])
def test_bfloat16_parameters_are_trained(engine, around):
    net, data = Net().bfloat16(), batches(1) * 60
    data = [{**batch, "x": batch["x"].bfloat16()} for batch in data]
    transform = around(tx.adamw(3e-3))
    step = steps.train_step(steps.module_loss(net, loss_fn), transform, engine=engine, accumulate=2)
    state, found = run(step, fts.TrainState.create(net, transform), data)
    assert {tensor.dtype for tensor in state.params.values()} == {torch.bfloat16}
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    donated, _ = run(steps.with_donation(step), fts.TrainState.create(net, transform), data)
    torch.testing.assert_close(donated.params, state.params, rtol=0, atol=0)


def test_pure_float16_with_a_scale_inside_master_weights():
    net, data = Net().half(), [{**batch, "x": batch["x"].half()} for batch in batches(1) * 40]
    transform = tx.master_weights(tx.dynamic_loss_scale(tx.adamw(3e-3), 2.0**12))
    for engine in ENGINES:
        step = steps.train_step(steps.module_loss(net, loss_fn), transform, engine=engine, accumulate=2)
        state, found = run(step, fts.TrainState.create(net, transform), data)
        assert found[-1]["loss"] < 0.6 * found[0]["loss"]
        assert all(torch.equal(state.params[name], master.half()) for name, master in state.opt_state.master.items())


def test_described():
    step = steps.train_step(steps.module_loss(Net(), loss_fn), optimizer(), precision="fp16")
    assert "fp16" in steps.describe(step) and "dynamic_loss_scale(4096, 2, 0.5, 3)" in steps.describe(step)
