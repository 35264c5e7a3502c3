"""Every transform has the properties (laws). A new one is checked by being in this list."""

import inspect

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fts.testing
from fts import transforms as tx
from fts.testing.comparison import transform_summary
from fts.testing.fast_paths import apply_equals_update, update_in_place_equals_update
from fts.testing.purity import inputs_unchanged, state_owns_its_memory
from fts.testing.structure import structure_is_stable
from fts.testing.transform_checks import run_examples
from tests.transforms.example_rules import EXAMPLES

NAMES = ("w", "b", "layers.10.norm.weight")


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim > 1


def has_no_b(name: str, tensor: torch.Tensor) -> bool:
    return "b" not in name


def by_shape(name: str, tensor: torch.Tensor) -> str:
    return "matrix" if tensor.ndim > 1 else "vector"


COSINE = tx.cosine_schedule(0.1, warmup_steps=2, total_steps=5)

# One line for each way in which a transform is used: its options, a schedule, a mask.
REGISTRY = [
    tx.identity(),
    tx.scale(-0.1),
    tx.scale(torch.tensor(0.5)),
    tx.set_to_zero(),
    tx.scale_by_schedule(tx.linear_schedule(1.0, -1.0, 3)),
    tx.scale_by_schedule(
        tx.join_schedules([tx.constant_schedule(1.0, warmup_steps=1), tx.polynomial_schedule(1.0, 0.0, 2.0, 3)], [2])
    ),
    tx.scale_by_schedule(lambda step: 0.5**step),
    tx.scale_by_learning_rate(0.1),
    tx.scale_by_learning_rate(torch.tensor(0.1)),
    tx.scale_by_learning_rate(tx.warmup(COSINE, 1)),
    tx.add_decayed_weights(0.1),
    tx.add_decayed_weights(0.1, mask=is_matrix),
    tx.clip_by_value(0.7),
    tx.clip_by_global_norm(1.0),
    tx.clip_by_block_rms(0.5),
    tx.adaptive_clip(0.1),
    tx.trace(0.9),
    tx.trace(0.9, nesterov=True),
    tx.sgd(0.1),
    tx.sgd(torch.tensor(0.1), momentum=0.9),
    tx.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    tx.sgd(COSINE, momentum=0.9, dampening=0.5),
    tx.scale_by_adam(),
    tx.scale_by_adam(b1=0.0, b2=0.5, eps=1e-3),
    tx.adam(0.1),
    tx.adam(COSINE, weight_decay=0.1),
    tx.adamw(0.1),
    tx.adamw(torch.tensor(0.1), weight_decay=0.0),
    tx.adamw(COSINE, weight_decay=0.1, mask=is_matrix),
    tx.skip_nonfinite(tx.adamw(0.1)),
    tx.skip_nonfinite(tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(COSINE, momentum=0.9)), limit=1),
    tx.skip_spikes(tx.adamw(0.1), warmup_steps=1),
    tx.skip_spikes(tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(COSINE, momentum=0.9)), 0.5, warmup_steps=1),
    tx.dynamic_loss_scale(tx.adamw(0.1), 4.0, growth_interval=2),
    tx.dynamic_loss_scale(tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(COSINE, momentum=0.9)), 3.0),
    tx.master_weights(tx.adamw(COSINE, weight_decay=0.1)),
    tx.master_weights(tx.dynamic_loss_scale(tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.1, momentum=0.9)), 4.0)),
    tx.stochastic_rounding(tx.adamw(0.1), seed=1),
    tx.multi_steps(tx.adamw(COSINE), every=2),
    tx.reduce_on_plateau(tx.adamw, 0.1, tx.Plateau()),
    tx.multi_steps(tx.chain(tx.clip_by_global_norm(1.0), tx.trace(0.9)), every=3),
    tx.ema_params(tx.adamw(0.1), decay=0.9),
    tx.ema_params(tx.sgd(COSINE, momentum=0.9), decay=0.9, debias=True),
    tx.ema_params(tx.scale(-0.1), decay=0.5),
    tx.add_noise(0.01, 0.55, seed=0),
    tx.centralize(),
    tx.masked(tx.adamw(0.1), mask=is_matrix),
    tx.masked(tx.add_decayed_weights(0.1), mask=has_no_b),
    tx.masked(tx.trace(0.9), mask=lambda name, tensor: False),
    tx.partition({"matrix": tx.adamw(COSINE), "vector": tx.sgd(0.1, momentum=0.9)}, by_shape),
    tx.partition({"matrix": tx.chain(tx.clip_by_global_norm(1.0), tx.adam(0.1)), "vector": tx.set_to_zero()}, by_shape),
    tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(COSINE, weight_decay=0.1)),
    tx.chain(tx.trace(0.9), tx.scale(-0.1), momentum=tx.trace(0.5), rate=tx.scale_by_learning_rate(0.1)),
    tx.chain(
        tx.clip_by_block_rms(1.0),
        tx.scale_by_adam(),
        tx.centralize(),
        tx.add_decayed_weights(0.1),
        tx.scale_by_learning_rate(COSINE),
    ),
    tx.chain(tx.sgd(0.1), tx.sgd(0.1, momentum=0.9)),
    tx.chain(
        tx.add_noise(0.01, 0.55, seed=1),
        tx.adaptive_clip(2.0),
        tx.skip_nonfinite(tx.multi_steps(tx.sgd(0.1, momentum=0.9), every=2)),
    ),
    tx.ema_params(
        tx.multi_steps(
            tx.skip_nonfinite(tx.partition({"matrix": tx.adamw(COSINE), "vector": tx.masked(tx.sgd(0.1), has_no_b)}, by_shape)),
            every=2,
        ),
        decay=0.9,
    ),
    *EXAMPLES,
]

# Those that know their parameters by name.
NAMED_REGISTRY = [
    tx.masked(tx.adamw(0.1), mask=["w"]),
    tx.masked(tx.sgd(0.1, momentum=0.9), mask={"w": True, "b": False, "layers.10.norm.weight": True}),
    tx.adamw(0.1, weight_decay=0.1, mask=["w"]),
    tx.add_decayed_weights(0.1, mask={"w": True, "b": False, "layers.10.norm.weight": False}),
    tx.partition({0: tx.adam(0.1), 1: tx.sgd(0.1)}, {"w": 0, "b": 1, "layers.10.norm.weight": 0}),
]

# Those that run eagerly only.
EAGER_REGISTRY = [
    tx.from_torch(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    tx.from_torch(torch.optim.SGD, lr=1.0, momentum=0.9, schedule=COSINE),
    tx.chain(tx.clip_by_global_norm(1.0), tx.from_torch(torch.optim.Adagrad, lr=0.1)),
    tx.ema_params(tx.skip_nonfinite(tx.from_torch(torch.optim.RMSprop, lr=0.1, momentum=0.9)), decay=0.9),
    tx.multi_steps(tx.from_torch(torch.optim.NAdam, lr=0.1), every=2),
    tx.partition({"matrix": tx.from_torch(torch.optim.Adamax, lr=0.1), "vector": tx.sgd(0.1)}, by_shape),
]

NOT_TRANSFORMS = {
    "apply_updates", "averaged_params", "eval_params", "global_norm", "loss_scale",
    "followed_rate", "steps_on_metric", "update_on_metric", "torch_moments",
    "bias_correction", "elementwise", "optimizer", "per_tensor",
    "constant_schedule", "cosine_restarts_schedule", "cosine_schedule", "inverse_sqrt_schedule", "join_schedules",
    "linear_schedule", "polynomial_schedule", "shift_schedule", "warmup", "warmup_stable_decay_schedule",
}  # fmt: skip


@pytest.mark.parametrize("transform", REGISTRY, ids=transform_summary)
def test_laws(transform: fts.Transform) -> None:
    fts.testing.check_transform(transform)


@pytest.mark.parametrize("transform", NAMED_REGISTRY, ids=transform_summary)
def test_laws_at_known_names(transform: fts.Transform) -> None:
    fts.testing.check_transform(transform, params=fts.testing.strategies.params(named=NAMES))


@pytest.mark.parametrize("transform", EAGER_REGISTRY, ids=transform_summary)
def test_laws_outside_of_graphs(transform: fts.Transform) -> None:
    untraceable = ["vmapped_equals_loop", "differentiable", "traced_equals_eager", "traced_once"]
    fts.testing.check_transform(transform, skip=untraceable)


@pytest.mark.parametrize("transform", REGISTRY, ids=transform_summary)
def test_fast_paths_agree_on_gradients_that_are_not_finite(transform: fts.Transform) -> None:
    laws = ["apply_equals_update", "update_in_place_equals_update", "structure_is_stable", "same_inputs_same_outputs"]
    fts.testing.check_transform(transform, laws=laws, nonfinite=True)


ROUNDING = ("master_weights", "stochastic_rounding")  # nothing comes behind them
NOT_LAST = [transform for transform in REGISTRY if not any(name in transform_summary(transform) for name in ROUNDING)]


@given(
    st.tuples(st.sampled_from(NOT_LAST), st.sampled_from(NOT_LAST), st.sampled_from(REGISTRY)),
    fts.testing.strategies.trajectories(),
)
@settings(max_examples=5 * settings().max_examples)
def test_any_three_in_a_chain(three, example) -> None:
    """Fast paths write in place: what is right alone may be wrong before or after another."""
    fts.testing.chain_is_associative(*three, *example)
    for law in (structure_is_stable, inputs_unchanged, apply_equals_update, update_in_place_equals_update, state_owns_its_memory):
        law(tx.chain(*three), *example)


WRAPPERS = {
    "skip_nonfinite": tx.skip_nonfinite,
    "skip_spikes": lambda inner: tx.skip_spikes(inner, 0.5, warmup_steps=1),
    "dynamic_loss_scale": lambda inner: (
        inner if transform_summary(inner).count("dynamic_loss_scale") else tx.dynamic_loss_scale(inner, 4.0)
    ),
    "master_weights": tx.master_weights,
    "stochastic_rounding": tx.stochastic_rounding,
    "multi_steps": lambda inner: tx.multi_steps(inner, every=2),
    "ema_params": lambda inner: tx.ema_params(inner, 0.9),
    "masked": lambda inner: tx.masked(inner, is_matrix),
    "partition": lambda inner: tx.partition({"matrix": inner, "vector": inner}, by_shape),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_any_other_inside(wrap) -> None:
    def check(example) -> None:
        transform, trajectory = example
        for law in (
            structure_is_stable,
            inputs_unchanged,
            apply_equals_update,
            update_in_place_equals_update,
            state_owns_its_memory,
        ):
            law(wrap(transform), *trajectory)

    run_examples(check, st.tuples(st.sampled_from(REGISTRY), fts.testing.strategies.trajectories()))


def test_every_public_factory_is_listed() -> None:
    factories = {name for name in tx.__all__ if inspect.isfunction(getattr(tx, name)) and name not in NOT_TRANSFORMS}
    listed = " ".join(map(transform_summary, [*REGISTRY, *NAMED_REGISTRY, *EAGER_REGISTRY]))
    missing = [name for name in sorted(factories) if name not in listed]
    assert not missing, f"add {missing} to REGISTRY in tests/laws/test_transforms.py"


def test_all_that_is_no_transform_is_known() -> None:
    assert set(tx.__all__) >= NOT_TRANSFORMS
