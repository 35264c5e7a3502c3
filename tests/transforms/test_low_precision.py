import pytest
import torch

import fts
from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import assert_close, by_apply, by_update

RUNS = [by_update, by_apply]
HALVES = [torch.bfloat16, torch.float16]


def trees(dtype, count):
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (7, 5), "b": (33,), "s": ()}

    def tree():
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return tree(), [tree() for _ in range(count)]


def widened(tree):
    return {name: tensor.float() for name, tensor in tree.items()}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "inner", [tx.adamw(0.3, weight_decay=0.1), tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.5, momentum=0.9))]
)
def test_master_weights_are_those_of_float32(run, dtype, inner):
    params, gradients = trees(dtype, 20)
    found, state, info = run(tx.master_weights(inner), params, gradients)
    expected, inner_state, inner_info = run(inner, widened(params), [widened(g) for g in gradients])
    assert_close(state.master, expected, rtol=0, atol=0)
    assert_close(state.inner, inner_state, rtol=0, atol=0)
    assert_close(info, inner_info, rtol=0, atol=0)
    assert_close(found, {name: tensor.to(dtype) for name, tensor in expected.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("run", RUNS)
def test_parameters_in_float32_pass(run):
    (halves, half_grads), (singles, single_grads) = trees(torch.bfloat16, 5), trees(torch.float32, 5)
    params = {"half": halves["w"], "single": singles["w"]}
    gradients = [{"half": h["w"], "single": s["w"]} for h, s in zip(half_grads, single_grads, strict=True)]
    found, state, _ = run(tx.master_weights(tx.adamw(0.1)), params, gradients)
    expected, _, _ = run(tx.adamw(0.1), widened(params), [widened(g) for g in gradients])
    assert list(state.master) == ["half"]
    assert_close(found["single"], expected["single"], rtol=0, atol=0)
    assert_close(found["half"], expected["half"].bfloat16(), rtol=0, atol=0)


def test_an_update_leads_to_the_rounded_copy_also_from_afar():
    """The difference of two bfloat16 numbers is none of them."""
    params = {"w": torch.tensor([1.0, 0.0078, -3.0], dtype=torch.bfloat16)}
    transform = tx.master_weights(tx.scale(1.0))
    grads = {"w": torch.tensor([2.0**-20 - 1, 1.0, 5.0]).bfloat16()}
    grads["w"][0] = -0.9960938
    updates, state, _ = transform.update(grads, transform.init(params), params)
    assert torch.equal(tx.apply_updates(params, updates)["w"], state.master["w"].bfloat16())


@pytest.mark.parametrize("run", RUNS)
def test_small_updates_are_kept(run):
    params = {"w": torch.full((10_000,), 1.0, dtype=torch.bfloat16)}
    gradients = [{"w": torch.full((10_000,), 1.0, dtype=torch.bfloat16)}] * 50
    plain, _, _ = run(tx.sgd(1e-3), params, gradients)
    assert torch.equal(plain["w"], params["w"])  # half the distance to the next number is 2e-3
    kept, state, _ = run(tx.master_weights(tx.sgd(1e-3)), params, gradients)
    assert torch.allclose(state.master["w"], torch.full((10_000,), 0.95))
    assert torch.equal(kept["w"], state.master["w"].bfloat16())
    rounded, _, _ = run(tx.stochastic_rounding(tx.sgd(1e-3)), params, gradients)
    assert rounded["w"].dtype == torch.bfloat16
    assert rounded["w"].float().mean().item() == pytest.approx(0.95, abs=5e-4)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("target", [1.0, 1.001, -3.3333, 1e-30, 1e30, 6e-39, 0.0])
def test_the_expectation_of_a_rounded_sum_is_the_sum(run, target):
    count = 200_000
    params = {"w": torch.zeros(count, dtype=torch.bfloat16)}
    transform = tx.stochastic_rounding(tx.scale(target))
    found, _, _ = run(transform, params, [{"w": torch.ones(count, dtype=torch.bfloat16)}])
    values = found["w"].double()
    exact = torch.tensor(target).double().item()  # as a float32
    low, high = values.min().item(), values.max().item()
    assert low <= exact <= high
    assert len(values.unique()) <= 2
    # six deviations of a mean of coin tosses
    assert abs(values.mean().item() - exact) <= 6 * 0.5 * (high - low) / count**0.5
    if high > low:  # neighbours
        assert torch.tensor(low).bfloat16().view(torch.int16).sub(torch.tensor(high).bfloat16().view(torch.int16)).abs() == 1


def test_numbers_of_bfloat16_stay_as_they_are():
    params, (grads,) = trees(torch.bfloat16, 1)
    transform = tx.stochastic_rounding(tx.set_to_zero())
    updates, _, _ = transform.update(grads, transform.init(params), params)
    assert_close(tx.apply_updates(params, updates), params, rtol=0, atol=0)


def test_what_is_not_finite_stays_so():
    params = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    grads = {"w": torch.tensor([torch.nan, torch.inf, -torch.inf]).bfloat16()}
    for run in RUNS:
        found, _, _ = run(tx.stochastic_rounding(tx.scale(1.0)), params, [grads])
        assert found["w"].isnan().tolist() == [True, False, False]
        assert found["w"][1:].tolist() == [torch.inf, -torch.inf]


def test_rounding_is_a_function_of_seed_count_and_name():
    def rounded(seed=0, before=0, name="w"):
        params = {"first": torch.zeros(1, dtype=torch.bfloat16), name: torch.full((1_000,), 1.0, dtype=torch.bfloat16)}
        if name == "other":  # its position does not matter
            params = dict(reversed(params.items()))
        transform = tx.stochastic_rounding(tx.scale(2.0**-10), seed)
        state = transform.init(params)._replace(step=torch.tensor(before))
        updates, _, _ = transform.update({k: torch.ones_like(p) for k, p in params.items()}, state, params)
        return updates[name]

    assert torch.equal(rounded(), rounded())
    assert torch.equal(rounded(name="other"), rounded(name="other"))
    for other in (rounded(seed=1), rounded(before=1), rounded(name="other")):
        assert not torch.equal(rounded(), other)
        assert abs((rounded() > 0).float().dot((other > 0).float()) / 1_000 - 1 / 64) < 0.02  # independent


def test_averages_outside_are_those_of_the_parameters():
    params, gradients = trees(torch.bfloat16, 4)
    for wrap in (tx.master_weights, tx.stochastic_rounding):
        averaging = tx.ema_params(wrap(tx.adamw(0.1)), 0.5)
        one, two = (run(averaging, params, gradients)[1] for run in RUNS)
        assert {t.dtype for t in tx.averaged_params(one).values()} == {torch.bfloat16}
        assert_close(tx.averaged_params(one), tx.averaged_params(two), rtol=0.02, atol=0.02)


def test_a_state_is_saved_and_loaded(tmp_path):
    params, gradients = trees(torch.bfloat16, 3)
    for transform in (tx.master_weights(tx.adamw(0.1)), tx.stochastic_rounding(tx.adamw(0.1), seed=5)):
        state = fts.TrainState.create(params, transform)
        trained, opt_state, _ = by_update(transform, params, gradients)
        state = state.replace(params=trained, opt_state=opt_state)
        loaded = fts.TrainState.load(state.save(tmp_path / transform.label), like=fts.TrainState.create(params, transform))
        assert_close(loaded.params, state.params, rtol=0, atol=0)
        assert_close(loaded.opt_state, state.opt_state, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [tx.master_weights, tx.stochastic_rounding])
def test_a_graph_rounds_as_eager_does_each_parameter_by_its_name(wrap):
    transform = wrap(tx.sgd(1.0))
    params = {name: torch.full((64,), 256.0, dtype=torch.bfloat16) for name in ("a.weight", "b.weight")}
    grads = {name: torch.full_like(tensor, -0.5) for name, tensor in params.items()}
    compiled = torch.compile(transform.update, backend="aot_eager", fullgraph=True)
    found, expected = (update(grads, transform.init(params), params)[0] for update in (compiled, transform.update))
    assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(found["a.weight"], found["b.weight"]) == (wrap is tx.master_weights)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.master_weights(0.1), "master_weights takes transforms, not 0.1"),
        (lambda: tx.stochastic_rounding(tx.sgd), "stochastic_rounding takes transforms"),
        (lambda: tx.stochastic_rounding(tx.sgd(0.1), seed=0.5), "seed must be an integer, not 0.5"),
        (
            lambda: tx.stochastic_rounding(tx.sgd(0.1)).init({"w": torch.ones(1, dtype=torch.float16)}),
            r"for bfloat16; w is in torch.float16. Wrap the transform in master_weights",
        ),
        (lambda: tx.master_weights(tx.sgd(0.1)).update({}, tx.MasterState((), {}), None), "master_weights needs the parameters"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_labels():
    inner = tx.sgd(0.1)
    for transform, label in [
        (tx.master_weights(inner), "master_weights"),
        (tx.stochastic_rounding(inner, 3), "stochastic_rounding(seed=3)"),
    ]:
        assert (transform.label, transform.children) == (label, (inner,))
    for wrap in (tx.master_weights, tx.stochastic_rounding):
        assert wrap(tx.centralize()).apply is None  # no fast path around a pure transform
