import math

import pytest
import torch
import torch.utils._pytree as pytree

from fts import transforms as tx
from fts.errors import ArgumentError, NonFiniteError
from fts.typing import Transform
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params


def optimizer():
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.linear_schedule(0.1, 0.0, 20)))


def with_bad(gradients, *indices, value=math.nan):
    gradients = copy(gradients)
    for i in indices:
        gradients[i]["kernel"][0, 0, 0, 0] = value
    return gradients


# ---- skip_nonfinite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("run", [by_update, by_apply])
def test_skipping_leaves_bad_gradients_out(run, value):
    params, gradients = make_params(), make_gradients(8)
    transform = tx.skip_nonfinite(optimizer(), limit=3)
    found, state, info = run(transform, params, with_bad(gradients, 0, 3, 4, value=value))
    expected, inner_state, inner_info = run(optimizer(), params, [gradients[i] for i in (1, 2, 5, 6, 7)])
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(state.inner, inner_state, rtol=0, atol=0)
    assert (int(state.total), int(state.in_a_row)) == (3, 0)
    assert list(info) == ["grad_norm", "lr", "skipped", "skipped_total", "skipped_in_a_row"]
    assert [int(info[key]) for key in ("skipped", "skipped_total", "skipped_in_a_row")] == [0, 3, 0]
    assert_close({key: info[key] for key in inner_info}, inner_info, rtol=0, atol=0)


@pytest.mark.parametrize("run", [by_update, by_apply])
def test_a_skipped_update_reports_what_inner_saw(run):
    transform = tx.skip_nonfinite(optimizer())
    _, state, info = run(transform, make_params(), with_bad(make_gradients(4), 2, 3))
    assert info["grad_norm"].isnan()
    assert [int(info[key]) for key in ("skipped", "skipped_total", "skipped_in_a_row")] == [1, 2, 2]
    assert all(tensor.dtype == torch.int64 for key, tensor in info.items() if key.startswith("skipped"))
    assert int(state.in_a_row) == 2


def test_apply_equals_update_when_skipping():
    params, gradients = make_params(), with_bad(make_gradients(8), 1, 2, 6)
    for inner in (optimizer(), tx.trace(0.9), tx.sgd(0.1, momentum=0.9)):
        assert_close(
            by_apply(tx.skip_nonfinite(inner), params, gradients), by_update(tx.skip_nonfinite(inner), params, gradients)
        )


def test_nothing_is_written_when_skipping():
    transform, params = tx.skip_nonfinite(optimizer()), make_params()
    good, bad = with_bad(make_gradients(2), 1)
    params, state, _ = transform.apply(good, transform.init(params), params)
    kept = copy((params, state.inner, bad))
    after, after_state, info = transform.apply(bad, state, params)
    assert_close((after, after_state.inner, bad), kept, rtol=0, atol=0)
    assert int(info["skipped"]) == 1


def test_finite_gradients_whose_squares_overflow_are_not_skipped():
    transform, params = tx.skip_nonfinite(tx.scale(-1e-30)), {"w": torch.zeros(2)}
    for run in (by_update, by_apply):
        found, _, info = run(transform, params, [{"w": torch.full((2,), 1e30)}])
        assert int(info["skipped"]) == 0
        torch.testing.assert_close(found["w"], torch.full((2,), -1.0))


def test_infos_are_not_overwritten_by_later_updates():
    transform = tx.skip_nonfinite(optimizer())
    params, state, infos = make_params(), transform.init(make_params()), []
    for grads in with_bad(make_gradients(3), 0, 1, 2):
        params, state, info = transform.apply(grads, state, params)
        infos.append(info)
    assert [int(info["skipped_total"]) for info in infos] == [1, 2, 3]
    assert [int(info["skipped_in_a_row"]) for info in infos] == [1, 2, 3]


@pytest.mark.parametrize("run", [by_update, by_apply])
def test_the_limit_raises_when_it_is_reached(run):
    transform = tx.skip_nonfinite(optimizer(), limit=3)
    params, gradients = make_params(), with_bad(make_gradients(7), 0, 2, 3, 5)
    transform.check(run(transform, params, gradients)[2])
    transform.check(run(transform, params, gradients[:4])[2])
    _, _, info = run(transform, params, with_bad(make_gradients(5), 0, 2, 3, 4))
    with pytest.raises(NonFiniteError, match=r"3 updates in a row \(limit 3, 4 in all\).*Lower the learning rate") as caught:
        transform.check(info)
    assert isinstance(caught.value, FloatingPointError)


def test_check_of_a_skipped_update_leaves_inner_alone():
    """A rate or norm that comes of bad gradients is no reason to stop: they were skipped."""

    def check(info):
        assert info["grad_norm"].isfinite()

    transform = tx.skip_nonfinite(tx.clip_by_global_norm(1.0)._replace(check=check))
    params = make_params()
    good, bad = with_bad(make_gradients(2), 1)
    transform.check(transform.update(good, transform.init(params), params)[2])
    transform.check(transform.update(bad, transform.init(params), params)[2])
    with pytest.raises(AssertionError):
        transform.check({"grad_norm": torch.tensor(math.nan), "skipped": torch.tensor(0)})


# ---- multi_steps


@pytest.mark.parametrize("run", [by_update, by_apply])
def test_multi_steps_updates_with_the_average(run):
    params, gradients = make_params(), make_gradients(11)
    found, state, info = run(tx.multi_steps(optimizer(), every=3), params, gradients)
    means = [{name: sum(g[name] for g in gradients[i : i + 3]) / 3 for name in params} for i in (0, 3, 6)]
    expected, inner_state, inner_info = run(optimizer(), params, means)
    assert_close(found, expected)
    assert_close(state.inner, inner_state)
    assert_close(info, inner_info)  # that of the last complete update
    assert int(state.gathered) == 2
    assert_close(state.sums, {name: gradients[9][name] + gradients[10][name] for name in params})


def test_multi_steps_apply_equals_update():
    params, gradients = make_params(), make_gradients(8)
    for inner in (optimizer(), tx.trace(0.9), tx.skip_nonfinite(tx.sgd(0.1, momentum=0.9))):
        for every in (1, 2, 5):
            transform = tx.multi_steps(inner, every)
            assert_close(by_apply(transform, params, gradients), by_update(transform, params, gradients))


def test_multi_steps_reports_the_same_keys_before_the_first_update():
    transform, params = tx.multi_steps(optimizer(), every=2), make_params()
    for run in (by_update, by_apply):
        _, _, info = run(transform, params, make_gradients(1))
        assert list(info) == ["grad_norm", "lr"]
        assert info["grad_norm"].item() == 0.0
        assert info["lr"].item() == 0.1


def test_multi_steps_keeps_no_tensor_that_others_hold():
    transform, params = tx.multi_steps(tx.adamw(0.1), every=2), make_params()
    state, held = transform.init(params), []
    for grads in make_gradients(6):
        params, state, info = transform.apply(grads, state, params)
        held.append((info["lr"], info["lr"].clone()))
        for tensor in pytree.tree_leaves(state):  # as a donated state's storage is overwritten
            assert all(tensor.data_ptr() != info.data_ptr() for info, _ in held)
    assert all(torch.equal(one, two) for one, two in held)


# ---- all


@pytest.mark.parametrize("wrap", [tx.skip_nonfinite, lambda t: tx.multi_steps(t, 2)])
def test_no_fast_path_around_a_pure_transform(wrap):
    assert wrap(tx.centralize()).apply is None
    assert wrap(tx.scale(1.0)).apply is not None
    assert wrap(tx.sgd(0.1)).apply is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.skip_nonfinite(0.1), "skip_nonfinite takes transforms, not 0.1"),
        (lambda: tx.skip_nonfinite(tx.sgd(0.1), limit=0), "limit must be an integer of at least 1, not 0"),
        (lambda: tx.skip_nonfinite(tx.sgd(0.1), limit=None), "limit .* not None"),
        (lambda: tx.multi_steps(tx.sgd, 2), "multi_steps takes transforms"),
        (lambda: tx.multi_steps(tx.sgd(0.1), 0), "every must be an integer of at least 1, not 0"),
        (lambda: tx.multi_steps(tx.sgd(0.1), 1.5), "every .* not 1.5"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_labels():
    inner = tx.sgd(0.1)
    for transform, label in [
        (tx.skip_nonfinite(inner), "skip_nonfinite(limit=10)"),
        (tx.multi_steps(inner, every=4), "multi_steps(every=4)"),
    ]:
        assert isinstance(transform, Transform)
        assert transform.label == label
        assert transform.children == (inner,)
