import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import assert_close, by_apply, by_update, make_gradients, make_params


def optimizer():
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.linear_schedule(0.1, 0.0, 20)))


@pytest.mark.parametrize("run", [by_update, by_apply])
@pytest.mark.parametrize("debias", [False, True])
def test_ema_of_the_new_parameters(run, debias):
    decay, params, gradients = 0.9, make_params(), make_gradients(6)
    found, state, _ = run(tx.ema_params(optimizer(), decay, debias), params, gradients)
    history = [by_update(optimizer(), params, gradients[:t])[0] for t in range(1, 7)]
    assert_close(found, history[-1])
    for name, start in params.items():
        average = torch.zeros_like(start) if debias else start
        for after in history:
            average = decay * average + (1 - decay) * after[name]
        expected = average / (1 - decay**6) if debias else average
        torch.testing.assert_close(tx.averaged_params(state)[name], expected, rtol=1e-12, atol=1e-14)


def test_ema_copies_the_parameters():
    transform, params = tx.ema_params(tx.sgd(0.1), 0.9), {"w": torch.ones(2, requires_grad=True)}
    average = tx.averaged_params(transform.init(params))["w"]
    assert not average.requires_grad
    params["w"].data.zero_()
    assert average.tolist() == [1.0, 1.0]


def test_ema_needs_the_parameters():
    transform, grads = tx.ema_params(tx.scale(1.0), 0.9), make_gradients(1)[0]
    with pytest.raises(ArgumentError, match="ema_params needs the parameters"):
        transform.update(grads, transform.init(grads), None)


def test_averaged_params_finds_the_state_anywhere():
    params = make_params()
    averaging = tx.ema_params(tx.sgd(0.1), 0.9)
    for transform in (
        averaging,
        tx.chain(tx.scale(1.0), averaging),
        tx.chain(tx.scale(1.0), last=averaging),
        tx.skip_nonfinite(tx.multi_steps(averaging, 2)),
        tx.masked(averaging, lambda name, p: True),
        tx.partition({1: averaging, 2: averaging}, lambda name, p: 1 + (p.ndim > 1)),
        tx.ema_params(tx.ema_params(tx.sgd(0.1), 0.5), 0.9),
    ):
        _, state, _ = by_update(transform, params, make_gradients(2))
        found = tx.averaged_params(state)
        assert set(found) == set(params)
    outer = by_update(averaging, params, make_gradients(2))[1]
    assert_close(found, tx.averaged_params(outer), rtol=0, atol=0)  # of nested averages the outermost
    with pytest.raises(ArgumentError, match=r"no average in this state: wrap the transform in ema_params"):
        tx.averaged_params(optimizer().init(params))


def test_no_fast_path_around_a_pure_transform():
    assert tx.ema_params(tx.centralize(), 0.9).apply is None
    assert tx.ema_params(tx.scale(1.0), 0.9).apply is not None
    assert tx.ema_params(tx.sgd(0.1), 0.9).apply is not None


def test_errors():
    with pytest.raises(ArgumentError, match="ema_params takes transforms"):
        tx.ema_params(tx.sgd, 0.9)
    with pytest.raises(ArgumentError, match=r"decay must be a number in \[0, 1\), not 1.0"):
        tx.ema_params(tx.sgd(0.1), 1.0)


def test_labels():
    inner = tx.sgd(0.1)
    assert tx.ema_params(inner, 0.99).label == "ema_params(0.99)"
    assert tx.ema_params(inner, 0.99, debias=True).label == "ema_params(0.99, debias)"
    assert tx.ema_params(inner, 0.99).children == (inner,)
