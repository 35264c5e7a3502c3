"""Training steps: purity, donation, replay, evaluation, compilation."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.errors import ArgumentError, CompileFallbackWarning, DonatedStateError, LossError, NonFiniteError

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler (g++ or clang++) to compile steps with"
)


def net_of(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def make_batch(seed: int, batch_size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch_size, 5, generator=generator), "y": torch.randint(0, 3, (batch_size,), generator=generator)}


def cross_entropy(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": (logits.argmax(-1) == batch["y"]).float().mean()}


def optimizer() -> fts.Transform:
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.cosine_schedule(1e-2, warmup_steps=3, total_steps=50)))


def tensors_of(state: fts.TrainState) -> list[torch.Tensor]:
    import optree

    return [tensor.clone() for tensor in optree.tree_leaves(state)]


def run(step, state, count: int = 5):
    for index in range(count):
        state, metrics = step(state, make_batch(index))
    return state, metrics


def assert_equal_states(one, two) -> None:
    for a, b in zip(tensors_of(one), tensors_of(two), strict=True):
        assert torch.equal(a, b)


def test_a_step_changes_no_input():
    net = net_of()
    state = fts.TrainState.create(net, optimizer(), seed=0)
    before, batch = tensors_of(state), make_batch(0)
    kept = copy.deepcopy(batch)
    steps.train_step(steps.module_loss(net, cross_entropy), optimizer())(state, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))
    assert all(torch.equal(batch[key], kept[key]) for key in batch)


@pytest.mark.parametrize("engine", ["module", "func"])
def test_donated_steps_give_the_same_bits(engine):
    net = net_of()
    plain = steps.train_step(steps.module_loss(net, cross_entropy), optimizer(), engine=engine)
    pure, _ = run(plain, fts.TrainState.create(net, optimizer(), seed=0))
    donated, _ = run(steps.with_donation(plain), fts.TrainState.create(net, optimizer(), seed=0))
    assert_equal_states(pure, donated)


def test_engines_give_the_same_trajectory():
    net = net_of().double()
    ends = []
    for engine in ("module", "func"):
        step = steps.train_step(steps.module_loss(net, double_loss), optimizer(), engine=engine)
        ends.append(run(step, fts.TrainState.create(net, optimizer(), seed=0))[0])
    for a, b in zip(tensors_of(ends[0]), tensors_of(ends[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def double_loss(model, batch):
    return F.cross_entropy(model(batch["x"].double()), batch["y"])


def test_a_replayed_step_gives_the_same_bits_with_dropout_and_batchnorm():
    net = net_of()
    step = steps.train_step(steps.module_loss(net, cross_entropy), optimizer(), accumulate=2)
    state, _ = run(step, fts.TrainState.create(net, optimizer(), seed=0))
    one, _ = step(state, make_batch(9))
    torch.rand(7)
    two, _ = step(state, make_batch(9))
    assert_equal_states(one, two)


def test_the_caller_s_module_is_untouched_until_apply_to():
    net = net_of()
    before = copy.deepcopy(net.state_dict())
    state, _ = run(
        steps.train_step(steps.module_loss(net, cross_entropy), optimizer(), donate=True),
        fts.TrainState.create(net, optimizer(), seed=0),
    )
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    state.apply_to(net)
    assert all(torch.equal(state.params[name], p) for name, p in net.named_parameters())
    assert all(torch.equal(state.buffers[name], b) for name, b in net.named_buffers())


def test_a_donated_state_names_the_step_that_consumed_it():
    net = net_of()
    state = fts.TrainState.create(net, optimizer())
    new, _ = steps.train_step(steps.module_loss(net, cross_entropy), optimizer(), donate=True)(state, make_batch(0))
    for use in (lambda: state.params, lambda: state.step, lambda: state.replace(seed=1), lambda: state.apply_to(net)):
        with pytest.raises(DonatedStateError, match="train_step"):
            use()
    assert "donated to train_step" in repr(state) and int(new.step) == 1


def test_metrics_hold_the_loss_function_s_own_and_the_transform_s():
    net = net_of()
    step = steps.train_step(steps.module_loss(net, cross_entropy), optimizer())
    _, metrics = step(fts.TrainState.create(net, optimizer()), make_batch(0))
    assert metrics.keys() == {"loss", "accuracy", "grad_norm", "lr"}
    assert all(value.ndim == 0 for value in metrics.values())


def test_a_metric_must_not_hide_the_transform_s():
    step = steps.train_step(lambda params, batch: (params["w"].sum(), {"lr": params["w"].sum()}), tx.sgd(0.1))
    with pytest.raises(LossError, match=r"\['lr'\]"):
        step(fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1)), torch.ones(1))


def test_the_limit_of_skipped_updates_raises():
    transform = tx.skip_nonfinite(tx.sgd(0.1), limit=2)
    for donate in (False, True):
        step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), transform, donate=donate)
        state = fts.TrainState.create({"w": torch.ones(2)}, transform)
        nan = torch.tensor([float("nan"), 1.0])
        with pytest.raises(NonFiniteError, match="2"):
            for _ in range(4):
                state, _ = step(state, nan)
        if donate:
            with pytest.raises(DonatedStateError, match="failed in the middle"):
                state.params  # noqa: B018
        else:
            assert torch.equal(state.params["w"], torch.ones(2))


def test_a_torch_optimizer_is_not_a_transform():
    with pytest.raises(ArgumentError, match="AdamW"):
        steps.train_step(lambda params, batch: batch, torch.optim.AdamW([torch.ones(1)]))


def test_evaluation_changes_nothing_and_is_weighted():
    net = net_of(0.5)
    state = fts.TrainState.create(net, optimizer())
    before = tensors_of(state)
    means = steps.eval_step(steps.module_loss(net, cross_entropy))(state, make_batch(0))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))
    net.eval()
    loss, metrics = cross_entropy(net, make_batch(0))
    torch.testing.assert_close(means["loss"][0], loss.detach())
    torch.testing.assert_close(means["accuracy"][0], metrics["accuracy"])
    assert means["loss"][1] == means["accuracy"][1] == 6


def test_a_step_reads_nothing_back_from_the_device_but_its_counter():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    net = net_of()
    step = steps.train_step(steps.module_loss(net, cross_entropy), tx.identity())
    state = fts.TrainState.create(net, tx.identity())
    with Reads() as reads:
        step(state, make_batch(0))
    assert reads.count == 1  # state.step, which is on the CPU


def test_describe_prints_the_pipeline():
    net = net_of()
    step = steps.train_step(steps.module_loss(net, cross_entropy), optimizer(), accumulate=4, precision="bf16")
    text = steps.describe(steps.compile(step))
    for part in ("compiled", "accumulate x4", "bf16", "Sequential, cross_entropy", "clip_by_global_norm(1.0)", "adamw", "cosine"):
        assert part in text, text


@needs_compiler
@pytest.mark.parametrize("donate", [False, True])
def test_a_compiled_step_equals_eager_never_recompiles_and_replays(donate):
    net = net_of(dropout=0.0)
    eager = steps.train_step(steps.module_loss(net, cross_entropy), optimizer(), accumulate=2)
    compiled = steps.compile(eager, donate=donate)
    expected, _ = run(eager, fts.TrainState.create(net, optimizer(), seed=0), 50)
    torch._dynamo.utils.counters.clear()
    end, metrics = run(compiled, fts.TrainState.create(net, optimizer(), seed=0), 50)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled.recompiles == 0
    for a, b in zip(tensors_of(expected), tensors_of(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == {"loss", "accuracy", "grad_norm", "lr"}


@needs_compiler
def test_a_compiled_step_replays_with_dropout():
    net = net_of(dropout=0.5)
    step = steps.compile(steps.train_step(steps.module_loss(net, cross_entropy), optimizer()))
    state, _ = run(step, fts.TrainState.create(net, optimizer(), seed=0))
    one, _ = step(state, make_batch(9))
    torch.rand(3)
    two, _ = step(state, make_batch(9))
    assert_equal_states(one, two)
    other, _ = step(state.replace(seed=1), make_batch(9))
    assert not torch.equal(one.params["4.weight"], other.params["4.weight"])


@needs_compiler
def test_a_compiled_step_trains_in_train_mode():
    net = net_of(0.5).eval()
    state = fts.TrainState.create(net, optimizer())
    state, _ = steps.compile(steps.train_step(steps.module_loss(net, cross_entropy), optimizer()))(state, make_batch(0))
    assert int(state.buffers["1.num_batches_tracked"]) == 1 and not net[1].training


def test_what_cannot_be_one_graph_runs_eagerly_with_one_warning():
    def loss(params, batch):
        torch._dynamo.graph_break()
        return (params["w"] * batch).sum()

    step = steps.compile(steps.train_step(loss, tx.sgd(0.1)), backend="eager")
    state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    with pytest.warns(CompileFallbackWarning, match="one graph"):
        state, _ = step(state, torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, _ = step(state, torch.ones(2))
    torch.testing.assert_close(state.params["w"], torch.tensor([0.8, 0.8]))


def test_a_user_s_composition_compiles():
    net = net_of(0.0)
    grad_fn = steps.value_and_grad(steps.module_loss(net, cross_entropy), engine="func")
    transform = tx.sgd(0.1)

    def twice(state, batch):
        for _ in range(2):
            value, grads = grad_fn(state, batch)
            state, info = steps.apply_gradients(state, grads, transform, buffers=value.buffers)
        return state, {"loss": value.loss, **info}

    state = fts.TrainState.create(net, transform)
    expected, _ = twice(state, make_batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = steps.compile(twice, backend="aot_eager")(state, make_batch(0))
    assert int(found.step) == 2
    for a, b in zip(tensors_of(expected), tensors_of(found), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_rejects_options_that_it_sets():
    with pytest.raises(ArgumentError, match="fullgraph"):
        steps.compile(steps.train_step(lambda params, batch: batch, tx.sgd(0.1)), fullgraph=False)
