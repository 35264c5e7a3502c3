import re

import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError, NonFiniteError, UnknownParameterError
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params

MATRICES = ["w", "kernel"]


def is_matrix(name, tensor):
    return tensor.ndim > 1


@pytest.mark.parametrize(
    "mask", [is_matrix, MATRICES, set(MATRICES), tuple(MATRICES), {"w": True, "kernel": 1, "b": False, "s": None}]
)
def test_masked_lets_the_others_pass(mask):
    transform = tx.masked(tx.chain(tx.trace(0.9), tx.scale(-1.0)), mask)
    params, gradients = make_params(), make_gradients(3)
    state = transform.init(params)
    assert list(state[0].trace) == MATRICES
    inner = tx.chain(tx.trace(0.9), tx.scale(-1.0))
    inner_state = inner.init({name: params[name] for name in MATRICES})
    for grads in gradients:
        for given in (params, None):
            updates, after, _ = transform.update(grads, state, given)
            expected, inner_after, _ = inner.update({name: grads[name] for name in MATRICES}, inner_state, None)
            assert list(updates) == list(grads)
            assert updates["b"] is grads["b"] and updates["s"] is grads["s"]
            assert_close({name: updates[name] for name in MATRICES}, expected, rtol=0, atol=0)
        state, inner_state = after, inner_after


def test_masked_fast_paths():
    params, gradients = make_params(), make_gradients(5)
    for inner in (tx.adamw(0.1), tx.trace(0.9), tx.sgd(0.1, momentum=0.5), tx.clip_by_global_norm(0.1)):
        for mask in (is_matrix, lambda name, p: True, lambda name, p: False):
            transform = tx.masked(inner, mask)
            assert_close(by_apply(transform, params, gradients), by_update(transform, params, gradients))
    assert tx.masked(tx.centralize(), is_matrix).apply is None


def test_a_predicate_may_return_anything_true():
    params, gradients = make_params(), make_gradients(3)
    expected = by_update(tx.adamw(0.1, weight_decay=0.5, mask=["w"]), params, gradients)
    for run in (by_update, by_apply):
        found = run(tx.adamw(0.1, weight_decay=0.5, mask=lambda name, p: re.match("w", name)), params, gradients)
        assert_close(found, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: tx.masked(tx.scale(1.0), mask),
        lambda mask: tx.adamw(0.1, mask=mask),
        lambda mask: tx.add_decayed_weights(0.1, mask=mask),
    ],
)
def test_mask_errors(make):
    params = make_params()
    with pytest.raises(
        UnknownParameterError, match="there is no parameter 'bias', 'weight' here; the names are 'b', 'kernel', 's', 'w'"
    ):
        make(["weight", "b", "bias"]).init(params)
    with pytest.raises(UnknownParameterError, match="no parameter 'weight'"):
        make({"weight": False}).init(params)
    with pytest.raises(UnknownParameterError, match="no entry for 'b', 's'; every parameter needs one"):
        make({"w": True, "kernel": True}).init(params)
    for bad in ("w", 3, None if make(["w"]).children else 0.5):
        with pytest.raises(ArgumentError, match=r"a mask is a predicate \(name, tensor\) -> bool, .* not"):
            make(bad)


def test_long_lists_of_names_are_abbreviated():
    params = {f"layer{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(UnknownParameterError, match=r"'x'.*'layer0', 'layer1', 'layer2', 'layer3' and 5 more"):
        tx.masked(tx.scale(1.0), ["x"]).init(params)


def groups():
    return {
        "matrix": tx.adamw(0.1),
        "vector": tx.chain(tx.clip_by_global_norm(0.5), tx.sgd(0.2, momentum=0.9)),
        "none": tx.scale(1.0),
    }


def by_shape(name, tensor):
    return "matrix" if tensor.ndim > 1 else "vector"


@pytest.mark.parametrize("label", [by_shape, {"w": "matrix", "kernel": "matrix", "b": "vector", "s": "vector"}])
def test_partition_runs_each_group_alone(label):
    transform = tx.partition(groups(), label)
    params, gradients = make_params(), make_gradients(4)
    found, state, info = by_update(transform, params, gradients)
    assert list(found) == list(params)
    assert set(state) == {"matrix", "vector"}  # the empty group has none
    assert set(info) == {"lr/matrix", "lr/vector", "grad_norm"}
    for key, names in (("matrix", MATRICES), ("vector", ["b", "s"])):
        own = [{name: grads[name] for name in names} for grads in gradients]
        expected, own_state, _ = by_update(groups()[key], {name: params[name] for name in names}, own)
        assert_close({name: found[name] for name in names}, expected, rtol=0, atol=0)
        assert_close(state[key], own_state, rtol=0, atol=0)
    assert_close(by_apply(transform, params, gradients), (found, state, info))
    updates, _, _ = transform.update_(copy(gradients[0]), transform.init(params), params)
    assert_close(updates, transform.update(gradients[0], transform.init(params), params)[0])


def test_partition_without_parameters():
    transform = tx.partition({"a": tx.scale(2.0), "b": tx.set_to_zero()}, lambda name, tensor: name)
    grads = {"b": torch.ones(2), "a": torch.ones(2)}
    updates, _, _ = transform.update(grads, transform.init(grads), None)
    assert list(updates) == ["b", "a"]
    assert updates["a"].tolist() == [2.0, 2.0] and updates["b"].tolist() == [0.0, 0.0]


def test_labels_need_not_be_strings():
    transform = tx.partition({True: tx.sgd(0.1), False: tx.sgd(0.2)}, is_matrix)
    _, state, info = by_update(transform, make_params(), make_gradients(1))
    assert set(state) == {"True", "False"}
    assert info["lr/True"].item() == 0.1


def test_each_group_checks_its_own_info():
    transform = tx.partition(
        {"strict": tx.skip_nonfinite(tx.sgd(0.1), limit=1), "lax": tx.skip_nonfinite(tx.sgd(0.1), limit=3)},
        {"a": "strict", "b": "lax"},
    )
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    bad, good = torch.full((2,), torch.nan), torch.ones(2)
    _, _, info = transform.update({"a": good, "b": bad}, transform.init(params), params)
    transform.check(info)
    _, _, info = transform.update({"a": bad, "b": good}, transform.init(params), params)
    with pytest.raises(NonFiniteError, match="limit 1"):
        transform.check(info)


def test_partition_errors():
    params = make_params()
    with pytest.raises(ArgumentError, match="at least one transform"):
        tx.partition({}, by_shape)
    with pytest.raises(ArgumentError, match=r"partition takes transforms, not 0\.1"):
        tx.partition({"a": 0.1}, by_shape)
    with pytest.raises(ArgumentError, match="written alike"):
        tx.partition({1: tx.scale(1.0), "1": tx.scale(1.0)}, by_shape)
    missing = tx.partition({"matrix": tx.scale(1.0)}, by_shape)
    with pytest.raises(ArgumentError, match=r"parameter 'b' has the label 'vector', but .* only for \['matrix'\]"):
        missing.init(params)
    with pytest.raises(UnknownParameterError, match="no parameter 'x'"):
        tx.partition(groups(), {**dict.fromkeys(params, "matrix"), "x": "matrix"}).init(params)
    with pytest.raises(UnknownParameterError, match="no entry for 'b', 'kernel', 's'"):
        tx.partition(groups(), {"w": "matrix"}).init(params)
    with pytest.raises(ArgumentError, match="masked takes transforms"):
        tx.masked(tx.sgd, is_matrix)


def test_labels():
    assert tx.masked(tx.scale(1.0), is_matrix).label == "masked(is_matrix)"
    assert tx.masked(tx.scale(1.0), ["b", "a"]).label == "masked('a', 'b')"
    assert tx.masked(tx.scale(1.0), {"a": True, "b": False}).label == "masked('a')"
    assert tx.partition(groups(), by_shape).label == "partition(matrix, vector, none)"
    assert [child.label for child in tx.partition(groups(), by_shape).children][-1] == "scale(1.0)"
