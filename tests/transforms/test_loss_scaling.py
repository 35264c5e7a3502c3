import math

import pytest
import torch
import torch.utils._pytree as pytree

from fts import transforms as tx
from fts.errors import ArgumentError, NonFiniteError
from fts.transforms.loss_scaling import check_unscales_first
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params

RUNS = [by_update, by_apply]


def optimizer():
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.linear_schedule(0.1, 0.0, 20)))


def scaled_by(gradients, scales, bad=()):
    """The gradients of losses that were multiplied by the scales; some of them with an overflow."""
    scaled = [{name: g * scale for name, g in grads.items()} for grads, scale in zip(gradients, scales, strict=True)]
    for i in bad:
        scaled[i]["kernel"][0, 0, 0, 0] = math.inf
    return scaled


def trajectory(transform, losses_finite, step="update"):
    """The scales that steps see, where the gradient of each step is finite or not."""
    params = {"w": torch.ones(3)}
    state, seen = transform.init(params), []
    for finite in losses_finite:
        scale = tx.loss_scale(state)
        seen.append((float(scale), int(state.growth_tracker)))
        grads = {"w": torch.full((3,), 1.0 if finite else math.nan) * scale}
        if step == "update":
            _, state, info = transform.update(grads, state, params)
        else:
            params, state, info = transform.apply(grads, state, params)
        assert float(info["loss_scale"]) == seen[-1][0]
        assert int(info["skipped"]) == (not finite)
    return seen


@pytest.mark.parametrize("step", ["update", "apply"])
@pytest.mark.parametrize(("growth", "backoff"), [(2.0, 0.5), (3.0, 0.1)])
def test_the_scale_moves_as_that_of_torch(step, growth, backoff):
    finite = [True] * 7 + [False] + [True] * 4 + [False, False] + [True] * 9
    options = {"init_scale": 2.0**15, "growth_factor": growth, "backoff_factor": backoff, "growth_interval": 3}
    found = trajectory(tx.dynamic_loss_scale(tx.sgd(0.1), **options), finite, step)
    scaler = torch.amp.GradScaler("cpu", **options)
    weight = torch.nn.Parameter(torch.ones(3))
    torch_sgd = torch.optim.SGD([weight], lr=0.1)
    expected = []
    for good in finite:
        scaled = scaler.scale((weight * (1.0 if good else math.nan)).sum())
        expected.append((scaler.get_scale(), scaler._get_growth_tracker()))
        scaled.backward()
        scaler.step(torch_sgd)
        scaler.update()
        weight.grad = None
    assert found == expected


def test_it_does_not_grow_out_of_float32():
    """GradScaler keeps the scale, too, where the next one would be infinite."""
    found = trajectory(tx.dynamic_loss_scale(tx.sgd(0.1), 2.0**126, growth_interval=1), [True] * 3)
    assert [scale for scale, _ in found] == [2.0**126, 2.0**127, 2.0**127]


@pytest.mark.parametrize("run", RUNS)
def test_training_equals_that_of_torch(run):
    """Overflows, clipping of unscaled gradients, AdamW whose bias correction counts applied updates only."""
    params, gradients = make_params(), make_gradients(12)
    bad = (0, 1, 6)
    transform = tx.dynamic_loss_scale(tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.01)), 2.0**10, growth_interval=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    torch_adamw = torch.optim.AdamW(weights.values(), lr=0.01, weight_decay=0.01)
    scales = []
    for i, grads in enumerate(gradients):
        scaler.scale(torch.zeros(()))
        scales.append(scaler.get_scale())
        for name, weight in weights.items():
            weight.grad = scaled_by([grads], [scales[-1]], bad=[0] if i in bad else [])[0][name].clone()
        scaler.unscale_(torch_adamw)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        scaler.step(torch_adamw)
        scaler.update()
    found, state, info = run(transform, params, scaled_by(gradients, scales, bad))
    assert_close(found, {name: weight.detach() for name, weight in weights.items()}, rtol=1e-6, atol=1e-7)
    assert float(tx.loss_scale(state)) == scaler.get_scale()
    assert (int(state.total), int(state.in_a_row)) == (3, 0)
    assert list(info) == ["grad_norm", "lr", "loss_scale", "skipped", "skipped_total", "skipped_in_a_row"]


@pytest.mark.parametrize("run", RUNS)
def test_a_skipped_update_changes_nothing_inside(run):
    params, gradients = make_params(), make_gradients(6)
    scales = [8.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    transform = tx.dynamic_loss_scale(optimizer(), 8.0)
    found, state, info = run(transform, params, scaled_by(gradients, scales, bad=[2]))
    expected, inner_state, inner_info = run(optimizer(), params, [gradients[i] for i in (0, 1, 3, 4, 5)])
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(state.inner, inner_state, rtol=0, atol=0)
    assert_close({key: info[key] for key in inner_info}, inner_info, rtol=0, atol=0)  # grad_norm is that of unscaled gradients


def test_nothing_is_written_where_an_update_is_skipped():
    params, (grads,) = make_params(), scaled_by(make_gradients(1), [1.0], bad=[0])
    transform = tx.dynamic_loss_scale(optimizer(), 1.0)
    state = transform.init(params)
    before = copy(params), copy(state.inner)
    after, state, _ = transform.apply(grads, state, params)
    assert_close((after, state.inner), before, rtol=0, atol=0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits_are_unscaled_in_float32(run, dtype):
    """With master weights around, a gradient that float16 cannot hold unscaled arrives."""
    params = {"w": torch.full((4,), 0.125, dtype=dtype)}
    small = 2.0**-26
    transform = tx.master_weights(tx.dynamic_loss_scale(tx.sgd(1.0), 2.0**16))
    grads = {"w": torch.full((4,), small * 2.0**16, dtype=dtype)}
    _, state, _ = run(transform, params, [grads] * 4)
    assert torch.equal(state.master["w"], torch.full((4,), 0.125 - 4 * small))


def test_the_scale_is_found_wherever_it_stands():
    scaled = tx.dynamic_loss_scale(tx.sgd(0.1), 4.0)
    params = {"w": torch.ones(1)}
    for transform in (scaled, tx.ema_params(scaled, 0.9), tx.master_weights(scaled), tx.chain(tx.multi_steps(scaled, 2))):
        state = transform.init(params)
        assert float(tx.loss_scale(state)) == 4.0
        assert any(leaf is tx.loss_scale(state) for leaf in pytree.tree_leaves(state))
        check_unscales_first(transform)
    with pytest.raises(ArgumentError, match=r"no loss scale in this state: wrap the transform in dynamic_loss_scale"):
        tx.loss_scale(tx.adamw(0.1).init(params))
    two = tx.partition({"a": scaled, "b": scaled}, lambda name, _: name)
    with pytest.raises(ArgumentError, match="There are 2 loss scales"):
        tx.loss_scale(two.init({"a": torch.ones(1), "b": torch.ones(1)}))


@pytest.mark.parametrize(
    "around",
    [
        lambda t: tx.chain(tx.clip_by_global_norm(1.0), t),
        lambda t: tx.masked(t, ["w"]),
        lambda t: tx.partition({0: t, 1: tx.sgd(0.1)}, lambda name, _: 0),
        tx.skip_spikes,
        lambda t: tx.ema_params(tx.chain(tx.add_decayed_weights(0.1), t), 0.9),
    ],
)
def test_what_uses_gradients_before_they_are_unscaled(around):
    with pytest.raises(ArgumentError, match=r"used before they are unscaled. Put everything else inside it"):
        check_unscales_first(around(tx.dynamic_loss_scale(tx.sgd(0.1))))
    check_unscales_first(around(tx.sgd(0.1)))


@pytest.mark.parametrize("step", ["update", "apply"])
def test_gradients_that_never_become_finite_are_an_error(step):
    transform, params = tx.dynamic_loss_scale(tx.sgd(0.1)), {"w": torch.ones(2)}
    state, skipped = transform.init(params), 0
    with pytest.raises(NonFiniteError, match=r"32 updates in a row, and the loss scale has fallen to 3.05176e-05"):
        while True:
            grads = {"w": torch.full((2,), math.nan)}
            if step == "update":
                _, state, info = transform.update(grads, state, params)
            else:
                params, state, info = transform.apply(grads, state, params)
            skipped += 1
            transform.check(info)
    assert skipped == 32
    assert torch.equal(params["w"], torch.ones(2))


def test_a_low_scale_alone_is_no_error():
    transform, params = tx.dynamic_loss_scale(tx.sgd(0.1), 2.0**-20), {"w": torch.ones(2)}
    _, _, info = transform.update({"w": torch.ones(2) * 2.0**-20}, transform.init(params), params)
    transform.check(info)


def test_check_of_a_skipped_update_leaves_inner_alone():
    def check(info):
        assert info["grad_norm"].isfinite()

    transform = tx.dynamic_loss_scale(tx.clip_by_global_norm(1.0)._replace(check=check))
    params = {"w": torch.ones(2)}
    transform.check(transform.update({"w": torch.full((2,), math.inf)}, transform.init(params), params)[2])
    with pytest.raises(AssertionError):
        transform.check({"grad_norm": torch.tensor(math.nan), "skipped": torch.tensor(0)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.dynamic_loss_scale(0.1), "dynamic_loss_scale takes transforms, not 0.1"),
        (lambda: tx.dynamic_loss_scale(tx.sgd(0.1), 0.0), "init_scale must be a number in .0, inf., not 0.0"),
        (lambda: tx.dynamic_loss_scale(tx.sgd(0.1), math.inf), "init_scale"),
        (lambda: tx.dynamic_loss_scale(tx.sgd(0.1), growth_factor=1.0), "growth_factor must be a number in .1, inf., not 1.0"),
        (lambda: tx.dynamic_loss_scale(tx.sgd(0.1), backoff_factor=1.0), "backoff_factor must be a number in .0, 1., not 1.0"),
        (lambda: tx.dynamic_loss_scale(tx.sgd(0.1), growth_interval=0), "growth_interval must be an integer of at least 1"),
        (lambda: tx.dynamic_loss_scale(tx.ema_params(tx.dynamic_loss_scale(tx.sgd(0.1)), 0.9)), "has a loss scale already"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_label():
    inner = tx.sgd(0.1)
    transform = tx.dynamic_loss_scale(inner)
    assert (transform.label, transform.children) == ("dynamic_loss_scale(65536, 2, 0.5, 2000)", (inner,))
    assert tx.dynamic_loss_scale(tx.centralize()).apply is None  # no fast path around a pure transform
