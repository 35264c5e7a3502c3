import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.typing import Transform
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params

LAST = Transform(
    init=lambda params: {name: torch.zeros_like(p) for name, p in params.items()},
    update=lambda grads, state, params: ({name: g - state[name] for name, g in grads.items()}, grads, {}),
    label="difference",
)
"""A user's transform with `update` alone, which keeps the gradients that it is given."""

OLD = Transform(
    init=lambda params: {name: p.clone() for name, p in params.items()},
    update=lambda grads, state, params: ({name: g + 0.1 * state[name] for name, g in grads.items()}, params, {}),
    label="pull to the last parameters",
)
"""One that keeps the parameters that it is given."""

SUM = Transform(
    init=lambda params: {name: torch.zeros_like(p) for name, p in params.items()},
    update=lambda grads, state, params: (total := {n: state[n] + g for n, g in grads.items()}, total, {}),
    label="sum",
)
"""One that returns its state as updates."""

SAME = Transform(
    init=lambda params: (),
    update=lambda grads, state, params: (dict.fromkeys(grads, next(iter(grads.values()))[..., :1].expand(2, 3)), (), {}),
    label="same",
)
"""One that returns one expanded tensor several times."""


def test_apply_updates_writes_nothing():
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    after = tx.apply_updates(params, {"w": torch.ones(2)})
    assert after["w"].dtype == torch.bfloat16
    assert after["w"].tolist() == [2.0, 2.0]
    assert params["w"].tolist() == [1.0, 1.0]


def test_identity():
    for transform in (tx.identity(), tx.chain()):
        grads = make_gradients(1)[0]
        assert transform.init(grads) == ()
        assert transform.update(grads, (), None) == (grads, (), {})
        assert transform.apply is None and transform.update_ is None and transform.check is None
        assert transform.label == "identity()"


def three():
    schedule = tx.linear_schedule(0.1, 0.0, 10)
    return tx.clip_by_global_norm(1.0), tx.trace(0.9), tx.scale_by_learning_rate(schedule)


def test_chain_is_associative_in_state_and_info():
    a, b, c = three()
    forms = [
        tx.chain(a, b, c),
        tx.chain(a, tx.chain(b, c)),
        tx.chain(tx.chain(a, b), c),
        tx.chain(tx.chain(a), tx.chain(b), tx.chain(c)),
    ]
    forms += [tx.chain(tx.identity(), a, tx.chain(), b, tx.chain(tx.chain(c))), tx.chain(tx.chain(tx.chain(a, b, c)))]
    params, gradients = make_params(), make_gradients(5)
    expected = by_update(forms[0], params, gradients)
    assert len(expected[1]) == 3
    for form in forms:
        assert_close(by_update(form, params, gradients), expected, rtol=0, atol=0)
        assert_close(by_apply(form, params, gradients), expected)
        assert form.children == (a, b, c)


def test_a_relabelled_chain_is_still_a_chain():
    a, b, c = three()
    assert tx.chain(tx.chain(a, b)._replace(label="mine"), c).children == (a, b, c)


def test_chain_is_the_composition():
    a, b, c = three()
    params, grads = make_params(), make_gradients(1)[0]
    expected = grads
    for transform in (a, b, c):
        expected, _, _ = transform.update(expected, transform.init(params), params)
    both = tx.chain(a, b, c)
    assert_close(both.update(grads, both.init(params), params)[0], expected, rtol=0, atol=0)


def test_infos_that_collide_get_a_number():
    clip, rate = tx.clip_by_global_norm(1.0), tx.scale_by_learning_rate(0.5)
    transform = tx.chain(clip, rate, tx.clip_by_global_norm(0.1), tx.scale_by_learning_rate(0.25), rate)
    _, _, info = by_update(transform, make_params(), make_gradients(1))
    assert list(info) == ["grad_norm", "lr", "grad_norm_2", "lr_2", "lr_3"]
    assert [info[key].item() for key in ("lr", "lr_2", "lr_3")] == [0.5, 0.25, 0.5]


def test_named_chain():
    transform = tx.chain(
        tx.scale(2.0), clip=tx.clip_by_global_norm(1.0), first=tx.sgd(0.5), second=tx.scale_by_learning_rate(0.25)
    )
    params, gradients = make_params(), make_gradients(3)
    _, state, info = by_update(transform, params, gradients)
    assert list(state) == ["0", "clip", "first", "second"]
    assert list(info) == ["grad_norm", "lr/first", "lr/second"]
    assert info["lr/second"].item() == 0.25
    assert_close(by_apply(transform, params, gradients), by_update(transform, params, gradients))
    unnamed = tx.chain(*transform.children)
    assert_close(by_update(unnamed, params, gradients)[0], by_update(transform, params, gradients)[0], rtol=0, atol=0)
    # a named chain is one child, because its state is found by name
    assert tx.chain(transform, tx.scale(1.0)).children[0] is transform
    assert transform.label == "chain(clip, first, second)"


def test_named_children_check_their_own_info():
    strict, lax = tx.skip_nonfinite(tx.scale(1.0), limit=1), tx.skip_nonfinite(tx.scale(1.0), limit=5)
    transform = tx.chain(lax=lax, strict=strict)
    bad = {"w": torch.tensor([float("nan")])}
    _, _, info = transform.update(bad, transform.init(bad), bad)
    transform.check(info)  # the first one zeroed the updates, so the strict one saw nothing wrong
    with pytest.raises(FloatingPointError, match="limit 1"):
        tx.chain(strict=strict, lax=lax).check(
            {"skipped_in_a_row/strict": torch.tensor(1), "skipped_in_a_row/lax": torch.tensor(0)}
        )
    tx.chain(strict=strict, lax=lax).check({"skipped_in_a_row/strict": torch.tensor(0), "skipped_in_a_row/lax": torch.tensor(4)})


def test_fast_path_only_where_a_child_has_one():
    assert tx.chain(tx.centralize(), tx.clip_by_block_rms(1.0)).apply is None
    assert tx.chain(tx.centralize(), tx.clip_by_block_rms(1.0)).update_ is None
    assert tx.chain(tx.centralize(), tx.scale(1.0)).apply is not None
    assert tx.chain(tx.centralize(), tx.sgd(1.0)).apply is not None


@pytest.mark.parametrize("pure", [LAST, OLD, SUM, SAME], ids=lambda t: t.label)
@pytest.mark.parametrize("place", ["first", "middle", "last", "alone"])
def test_pure_transforms_are_safe_among_those_that_write(pure, place):
    transform = {
        "first": lambda: tx.chain(pure, tx.scale(0.5), tx.sgd(0.1, momentum=0.9)),
        "middle": lambda: tx.chain(tx.scale(0.5), pure, tx.trace(0.9), tx.scale(-0.1)),
        "last": lambda: tx.chain(tx.scale(-0.1), tx.trace(0.5), pure),
        "alone": lambda: tx.chain(tx.clip_by_value(0.1), tx.ema_params(pure, 0.5), tx.scale(1.0)),
    }[place]()
    generator = torch.Generator().manual_seed(0)
    params, *gradients = [{name: torch.randn(2, 3, generator=generator, dtype=torch.float64) for name in "ab"} for _ in range(6)]
    expected = by_update(transform, params, gradients)
    assert_close(by_apply(transform, params, gradients), expected)
    # and never a write to what is not the fast path's own: the parameters, in update_
    if transform.update_ is not None:
        kept = copy(params)
        transform.update_(copy(gradients[0]), transform.init(params), params)
        assert_close(params, kept, rtol=0, atol=0)


def test_errors():
    with pytest.raises(ArgumentError, match=r"chain takes transforms, not .*sgd.*not called, as in `sgd"):
        tx.chain(tx.sgd)
    with pytest.raises(ArgumentError, match=r"chain takes transforms, not 0\.1"):
        tx.chain(rate=0.1)
    with pytest.raises(ArgumentError, match="the name '0' stands for the child at that index"):
        tx.chain(tx.scale(1.0), **{"0": tx.scale(1.0)})


def test_labels():
    optimizer = tx.chain(
        tx.clip_by_global_norm(1.0), tx.adamw(tx.cosine_schedule(3e-4, warmup_steps=100, total_steps=1_000), weight_decay=0.01)
    )
    assert optimizer.label == "chain"
    assert [child.label for child in optimizer.children] == [
        "clip_by_global_norm(1.0)",
        "adamw(lr=cosine_schedule(0.0003, warmup 100, total 1000), weight_decay=0.01)",
    ]
