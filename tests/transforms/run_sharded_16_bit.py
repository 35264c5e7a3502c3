"""What `run_sharded.py` checks of loss scales and of parameters in 16 bits."""

import math

import torch
import torch.distributed as dist

from fts import transforms as tx
from fts.dtensors import full_tensor
from fts.testing.comparison import require_close, require_equal
from fts.testing.sharded import SHARDING_LAYOUTS, full_tensors, shard_tensors

SHAPES = {"w": (3, 4), "b": (1,), "kernel": (2, 3, 2, 2), "temperature": ()}


def tree(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def both_ways(transform, params, gradients):
    """Parameters and state after some updates, by `update` and by `apply`."""
    state, weights = transform.init(params), params
    for grads in gradients:
        updates, state, info = transform.update(grads, state, weights)
        weights = tx.apply_updates(weights, updates)
    yield weights, state, info
    state, weights = transform.init(params), {name: p.clone() for name, p in params.items()}
    for grads in gradients:
        weights, state, info = transform.apply({name: g.clone() for name, g in grads.items()}, state, weights)
    yield weights, state, info


def low_precision_equals_full_tensors() -> None:
    for transform in (
        tx.master_weights(tx.adamw(0.1)),
        tx.master_weights(tx.dynamic_loss_scale(tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.1)), 4.0)),
        tx.stochastic_rounding(tx.adamw(0.1), seed=3),
    ):
        params, gradients = tree(0, torch.bfloat16), [tree(1 + i, torch.bfloat16) for i in range(2)]
        for layout in SHARDING_LAYOUTS:
            expected = both_ways(transform, params, gradients)
            found = both_ways(transform, shard_tensors(params, layout), [shard_tensors(grads, layout) for grads in gradients])
            for (one, state, info), (two, own, reported) in zip(expected, found, strict=True):
                # bit for bit: the same numbers are rounded up everywhere
                require_equal(f"{transform.label}, {layout}: params", full_tensors(two), one)
                require_close(f"{transform.label}, {layout}: state", full_tensors(own), state)
                require_close(
                    f"{transform.label}, {layout}: info", {key: full_tensor(value) for key, value in reported.items()}, info
                )


def overflow_on_one_rank_is_skipped_on_all() -> None:
    """The last row, which is on the last rank, has an overflow."""
    wrappers = {
        "skipped": tx.skip_nonfinite(tx.adamw(0.1)),
        "skipped ": tx.dynamic_loss_scale(tx.adamw(0.1), 4.0),
        "spike": tx.skip_spikes(tx.adamw(0.1), warmup_steps=1),
    }
    for key, transform in wrappers.items():
        params, grads = tree(0, torch.float32), tree(1, torch.float32)
        bad = {name: g.clone() for name, g in grads.items()}
        bad["w"][2, 3] = math.inf
        for layout in SHARDING_LAYOUTS:
            start = shard_tensors(params, layout)
            for after, state, info in both_ways(transform, start, [shard_tensors(bad, layout)]):
                require_equal(f"{transform.label}, {layout}", full_tensors(after), params)
                flags = torch.zeros(dist.get_world_size(), dtype=torch.int64)
                flags[dist.get_rank()] = int(info[key.strip()])
                dist.all_reduce(flags)
                assert flags.eq(1).all(), flags
                if transform.label.startswith("dynamic"):
                    assert float(tx.loss_scale(state)) == 2.0
