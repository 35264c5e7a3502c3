"""Every transform can be built inside a graph, traced, vmapped and differentiated, and copies what it keeps."""

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
from torch import Tensor

from fts import transforms as tx
from tests.transforms.trajectories import assert_close, copy, make_gradients, make_params

COSINE = tx.cosine_schedule(0.1, warmup_steps=2, total_steps=6)


def is_matrix(name, tensor):
    return tensor.ndim > 1


TRANSFORMS = {
    "identity": tx.identity,
    "chain": lambda: tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.cosine_schedule(0.1, warmup_steps=2, total_steps=6))),
    "named chain": lambda: tx.chain(tx.scale(2.0), clip=tx.clip_by_global_norm(1.0), a=tx.sgd(0.1), b=tx.sgd(0.1)),
    "masked": lambda: tx.masked(tx.adamw(0.1), {"w": True, "b": False, "kernel": True, "s": False}),
    "partition": lambda: tx.partition({"m": tx.adamw(0.1), "v": tx.sgd(0.1)}, lambda name, p: "m" if p.ndim > 1 else "v"),
    "scale": lambda: tx.scale(0.1),
    "set_to_zero": tx.set_to_zero,
    "scale_by_schedule": lambda: tx.scale_by_schedule(tx.polynomial_schedule(0.1, 0.0, 2.0, 5)),
    "scale_by_learning_rate": lambda: tx.scale_by_learning_rate(0.1),
    "scale_by_learning_rate, schedule": lambda: tx.scale_by_learning_rate(tx.linear_schedule(0.1, 0.0, 5, warmup_steps=2)),
    "add_decayed_weights": lambda: tx.add_decayed_weights(0.1, mask=["w"]),
    "clip_by_value": lambda: tx.clip_by_value(0.3),
    "clip_by_global_norm": lambda: tx.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: tx.clip_by_block_rms(0.3),
    "adaptive_clip": lambda: tx.adaptive_clip(0.1),
    "trace": lambda: tx.trace(0.9, nesterov=True),
    "sgd": lambda: tx.sgd(COSINE, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "scale_by_adam": tx.scale_by_adam,
    "adam": lambda: tx.adam(0.1, weight_decay=0.1),
    "adamw": lambda: tx.adamw(tx.join_schedules([tx.constant_schedule(0.1), tx.warmup(COSINE, 3)], [1]), mask=is_matrix),
    "skip_nonfinite": lambda: tx.skip_nonfinite(tx.adamw(COSINE)),
    "skip_spikes": lambda: tx.skip_spikes(tx.adamw(COSINE), warmup_steps=1),
    "dynamic_loss_scale": lambda: tx.dynamic_loss_scale(tx.adamw(COSINE), init_scale=4.0, growth_interval=2),
    "master_weights": lambda: tx.master_weights(tx.adamw(COSINE)),
    "stochastic_rounding": lambda: tx.stochastic_rounding(tx.adamw(COSINE)),
    "multi_steps": lambda: tx.multi_steps(tx.adamw(COSINE), every=2),
    "ema_params": lambda: tx.ema_params(tx.adamw(COSINE), 0.9),
    "ema_params, debias": lambda: tx.ema_params(tx.adamw(COSINE), 0.9, debias=True),
    "add_noise": lambda: tx.add_noise(0.1, 0.55, seed=0),
    "centralize": tx.centralize,
    "reduce_on_plateau": lambda: tx.reduce_on_plateau(lambda lr: tx.chain(tx.trace(0.9), tx.adamw(lr)), 0.1, tx.Plateau()),
    "reduce_on_plateau, greedy": lambda: tx.reduce_on_plateau(tx.sgd, 0.1, tx.Greedy(smooth=True)),
}

PARAMS, GRADIENTS = make_params(), make_gradients(3)


def test_every_transform_is_here():
    public = {name for name in tx.__all__ if name.islower()}
    functions = {"apply_updates", "averaged_params", "eval_params", "global_norm", "join_schedules", "warmup"}
    functions |= {"followed_rate", "steps_on_metric", "loss_scale", "update_on_metric", "torch_moments"}
    functions |= {"bias_correction", "elementwise", "optimizer", "per_tensor"}
    functions |= {"from_torch"}  # runs eagerly only
    schedules = {name for name in public if name.endswith("_schedule") and not name.startswith("scale")}
    assert public - functions - schedules <= {name.split(",")[0] for name in TRANSFORMS}


def run(transform, params, gradients):
    state = transform.init(params)
    for grads in gradients:
        updates, state, info = transform.update(grads, state, params)
        params = tx.apply_updates(params, updates)
    return params, state, info


@pytest.mark.parametrize("name", TRANSFORMS)
def test_built_and_traced_as_one_graph(name):
    make = TRANSFORMS[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda p, g: run(make(), p, [g, g]), fullgraph=True, backend="aot_eager")
    assert_close(compiled(PARAMS, GRADIENTS[0]), run(make(), PARAMS, [GRADIENTS[0]] * 2))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_vmap(name):
    """A population: parameters, gradients and states, counters too, get a first axis."""
    transform = TRANSFORMS[name]()
    scales = (1.0, 0.5, -2.0)

    def stacked(tree):
        return pytree.tree_map(lambda t: torch.stack([t * scale for scale in scales]), tree)

    found = torch.vmap(lambda p, *g: run(transform, p, g))(stacked(PARAMS), *map(stacked, GRADIENTS))
    for i, scale in enumerate(scales):
        expected = run(transform, pytree.tree_map(lambda t: t * scale, PARAMS), pytree.tree_map(lambda t: t * scale, GRADIENTS))  # noqa: B023
        assert_close(pytree.tree_map(lambda t: t[i], found), expected)  # noqa: B023


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradient_through_update(name):
    transform = TRANSFORMS[name]()

    def total(grads):
        after, _, _ = run(transform, PARAMS, [grads, GRADIENTS[1], GRADIENTS[2]])
        return sum((p * PARAMS[name]).sum() for name, p in after.items())

    slopes = torch.func.grad(total)(GRADIENTS[0])
    nudge = 1e-6
    for key in ("w", "s"):
        direction = torch.sign(PARAMS[key])
        up, down = ({**GRADIENTS[0], key: GRADIENTS[0][key] + sign * nudge * direction} for sign in (1, -1))
        expected = (total(up) - total(down)) / (2 * nudge)
        torch.testing.assert_close((slopes[key] * direction).sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_update_is_pure(name):
    transform = TRANSFORMS[name]()
    state = transform.init(PARAMS)
    _, state, _ = transform.update(GRADIENTS[0], state, PARAMS)
    given = (GRADIENTS[1], state, PARAMS)
    kept = copy(given)
    one, two = transform.update(*given), transform.update(*given)
    assert_close(given, kept, rtol=0, atol=0)
    assert_close(one, two, rtol=0, atol=0)
    updates, after, info = one
    assert list(updates) == list(GRADIENTS[1])
    assert pytree.tree_structure(after) == pytree.tree_structure(state)
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(after))
    assert all(isinstance(value, Tensor) and value.shape == () for value in info.values())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_init_copies(name):
    transform, params = TRANSFORMS[name](), {name: torch.nn.Parameter(p.clone()) for name, p in PARAMS.items()}
    leaves = pytree.tree_leaves(transform.init(params))
    memory = {p.data_ptr() for p in params.values()}
    assert all(isinstance(leaf, Tensor) and not leaf.requires_grad and leaf.data_ptr() not in memory for leaf in leaves)
    assert all(leaf.dtype == torch.int64 for leaf in leaves if leaf.shape == () and not leaf.is_floating_point())


def test_a_compiled_update_is_traced_once():
    transform = TRANSFORMS["chain"]()
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(transform.update, fullgraph=True, backend=counter)
    params, state = PARAMS, transform.init(PARAMS)
    for grads in make_gradients(10):
        updates, state, _ = compiled(grads, state, params)
        params = tx.apply_updates(params, updates)
    assert counter.frame_count == 1
