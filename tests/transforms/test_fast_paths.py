"""Fast paths give what `update` gives, in every layout, dtype and order of the tensors."""

import pytest
import torch
from torch import Tensor

from fts import transforms as tx
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params

SCHEDULE = tx.cosine_schedule(0.1, warmup_steps=2, total_steps=6)

FAST = {
    "clip_by_value": lambda: tx.clip_by_value(0.3),
    "clip_by_global_norm": lambda: tx.clip_by_global_norm(1.0),
    "scale": lambda: tx.scale(-0.5),
    "scale by a tensor": lambda: tx.scale(torch.tensor(-0.5, dtype=torch.float64)),
    "set_to_zero": tx.set_to_zero,
    "scale_by_schedule": lambda: tx.scale_by_schedule(SCHEDULE),
    "scale_by_learning_rate": lambda: tx.scale_by_learning_rate(SCHEDULE),
    "add_decayed_weights": lambda: tx.add_decayed_weights(0.1),
    "trace": lambda: tx.trace(0.9),
    "trace, nesterov": lambda: tx.trace(0.9, nesterov=True),
    "scale_by_adam": tx.scale_by_adam,
    "sgd": lambda: tx.sgd(SCHEDULE),
    "sgd, momentum": lambda: tx.sgd(SCHEDULE, momentum=0.9, weight_decay=0.1),
    "sgd, dampening": lambda: tx.sgd(0.1, momentum=0.9, dampening=0.3),
    "sgd, nesterov": lambda: tx.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: tx.adam(SCHEDULE, weight_decay=0.1),
    "adamw": lambda: tx.adamw(SCHEDULE),
    "adamw, mask": lambda: tx.adamw(0.1, weight_decay=0.3, mask=lambda name, p: p.ndim > 1),
    "adamw, full mask": lambda: tx.adamw(0.1, weight_decay=0.3, mask=lambda name, p: True),
}
HAVE_APPLY = {"set_to_zero", *(name for name in FAST if name.startswith(("sgd", "adam")))}


def as_apply(transform):
    return transform if transform.apply else tx.chain(transform)


@pytest.mark.parametrize("name", FAST)
def test_which_fast_paths_there_are(name):
    transform = FAST[name]()
    assert transform.update_ is not None
    assert (transform.apply is not None) == (name in HAVE_APPLY)
    assert tx.chain(transform).apply is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FAST)
def test_equal_update(name, dtype):
    transform, params, gradients = FAST[name](), make_params(dtype), make_gradients(5, dtype)
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    with_apply = as_apply(transform)
    assert_close(by_apply(with_apply, params, gradients), by_update(with_apply, params, gradients), **tolerance)
    state, fast = transform.init(params), transform.init(params)
    for grads in gradients:
        kept = copy(params)
        expected, state, info = transform.update(grads, state, params)
        found, fast, fast_info = transform.update_(copy(grads), fast, params)
        assert_close((found, fast, fast_info), (expected, state, info), **tolerance)
        assert_close(params, kept, rtol=0, atol=0)
        for tensor in found.values():
            tensor.fill_(1e9)  # the caller may write into updates


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers in another order in memory."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def strided(tensor: Tensor) -> Tensor:
    """Every second number of a larger tensor."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("name", ["sgd, momentum", "sgd, dampening", "adam", "adamw", "adamw, mask"])
@pytest.mark.parametrize(
    ("of_params", "of_grads"),
    [(same, transposed), (transposed, same), (transposed, transposed), (channels_last, same), (channels_last, channels_last),
     (strided, same), (same, strided), (strided, strided)],
)  # fmt: skip
def test_layouts(name, of_params, of_grads):
    """The fused kernels ignore strides: they would read the right memory in the wrong order."""
    transform, params, gradients = FAST[name](), make_params(), make_gradients(4)
    expected = by_update(transform, params, gradients)
    weights = {key: of_params(p.clone()) for key, p in params.items()}
    state = transform.init(weights)
    for grads in gradients:
        weights, state, info = transform.apply({key: of_grads(g.clone()) for key, g in grads.items()}, state, weights)
    assert_close((weights, state, info), expected)


@pytest.mark.parametrize("name", ["sgd, momentum", "adamw"])
def test_moments_in_another_layout(name):
    """As a compiled step may return them."""
    transform, params, gradients = FAST[name](), make_params(), make_gradients(2)
    expected = by_update(transform, params, gradients)
    weights, state, _ = by_update(transform, params, gradients[:1])
    state = torch.utils._pytree.tree_map(transposed, state)
    assert_close(transform.apply(copy(gradients[1]), state, weights), expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_expanded_and_shared_gradients(name):
    """`autograd.grad` gives such gradients for sums."""
    transform, params = FAST[name](), {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}
    for shared in (torch.ones(()).expand(3, 4), torch.rand(3, 1).expand(3, 4), torch.rand(3, 4)):
        grads = {"a": shared, "b": shared}
        expected = by_update(transform, params, [grads])
        weights = copy(params)
        assert_close(transform.apply(grads, transform.init(weights), weights), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FAST if name != "clip_by_global_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    transform = as_apply(FAST[name]())
    params = {key: torch.linspace(-1, 1, 60).to(dtype) for key in "ab"}
    gradients = [{key: torch.linspace(1, -0.7, 60).to(dtype) * i for key in "ab"} for i in range(1, 4)]
    expected = by_update(transform, params, gradients)
    assert_close(by_apply(transform, params, gradients), expected, rtol=0.05, atol=0.05)
    assert not torch.equal(expected[0]["a"], params["a"]) or name == "set_to_zero"


@pytest.mark.parametrize("name", FAST)
def test_mixed_dtypes(name):
    transform = as_apply(FAST[name]())
    dtypes = {"w": torch.float64, "b": torch.float32, "kernel": torch.bfloat16, "s": torch.float64}
    params = {key: p.to(dtypes[key]) for key, p in make_params().items()}
    gradients = [{key: g.to(dtypes[key]) for key, g in grads.items()} for grads in make_gradients(3)]
    assert_close(by_apply(transform, params, gradients), by_update(transform, params, gradients), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FAST)
def test_gradients_in_another_order(name):
    transform, params, gradients = as_apply(FAST[name]()), make_params(), make_gradients(3)
    backwards = [dict(reversed(grads.items())) for grads in gradients]
    assert_close(by_apply(transform, params, backwards)[0], by_update(transform, params, gradients)[0])


@pytest.mark.parametrize("name", FAST)
def test_empty_tensors(name):
    transform = as_apply(FAST[name]())
    params = {"none": torch.zeros(0, 3), "w": torch.ones(2, 2)}
    found, _, _ = by_apply(transform, params, [copy(params)] * 2)
    assert found["none"].shape == (0, 3)
    assert found["w"].isfinite().all()


def test_constant_infos_are_reported_once_made():
    transform, params = tx.adamw(0.1), make_params()
    state = transform.init(params)
    infos = [transform.apply(grads, state, params)[2] for grads in make_gradients(2)]
    assert infos[0]["lr"] is infos[1]["lr"]
    with torch.inference_mode():
        info = tx.sgd(0.12345).apply(make_gradients(1)[0], tx.sgd(0.12345).init(params), make_params())[2]
    assert not info["lr"].is_inference()
    assert info["lr"].device.type == "cpu"


@pytest.mark.parametrize("name", [*FAST, "skip_nonfinite", "skip_spikes", "multi_steps", "ema_params"])
def test_nothing_is_read_off_the_cpu(name):
    """Meta tensors have no values, so any read of one (a synchronisation on a GPU) raises."""
    wrapped = {
        "skip_nonfinite": lambda: tx.skip_nonfinite(tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(SCHEDULE))),
        "skip_spikes": lambda: tx.skip_spikes(tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(SCHEDULE))),
        "multi_steps": lambda: tx.multi_steps(tx.sgd(SCHEDULE, momentum=0.9), 2),
        "ema_params": lambda: tx.ema_params(tx.adamw(SCHEDULE), 0.9, debias=True),
    }
    transform = as_apply({**FAST, **wrapped}[name]())
    params = {key: p.to("meta") for key, p in make_params().items()}
    state = transform.init(params)
    assert all(leaf.device.type == "meta" for leaf in torch.utils._pytree.tree_leaves(state))
    for _ in range(2):
        grads = {key: torch.empty_like(p) for key, p in params.items()}
        params, state, info = transform.apply(grads, state, params)
        if transform.update_ is not None:
            _, state, _ = transform.update_(grads, state, params)
    assert all(value.device.type == "meta" for value in info.values())
