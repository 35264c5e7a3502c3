"""Counter-based randomness: every random number is a function of the seed and of its position in the run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fts.dtensors import from_local_like, global_indices

STEP, DATA, EVALUATION = 1, 2, 3
"""The first position argument of `fold_in`: the purpose of the random numbers, so that no two purposes share a stream."""

_MASK = (1 << 64) - 1


def fold_in(seed: int, *position: int) -> int:
    """Fold integers, the position in a run, into a seed; gives a new 64-bit seed.

    Args:
        seed: any integer.
        position: `STEP`, `DATA` or `EVALUATION`, then integers such as the step and the micro-batch.

    Returns:
        A non-negative integer below 2**63, different for different positions.

    >>> fold_in(0, STEP, 2) == fold_in(0, STEP, 2), fold_in(0, STEP, 2) == fold_in(0, DATA, 2)
    (True, False)

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators").
    """
    z = seed & _MASK
    for value in (0, *position):
        z = (z + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z >> 1


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's, numpy's and Python's generators, and that of `device` if it has its own.

    `torch.manual_seed` would visit every backend (139 us on a machine where this takes 7).

    Args:
        seed: a non-negative integer, usually from `fold_in`.
        device: on which the next random numbers are drawn; None means the CPU.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    if device is not None and device.type != "cpu":
        _device_generator(device).manual_seed(seed)


def seed_microbatch(seed: int, step: int, index: int, device: torch.device | None = None) -> None:
    """Seed the generators for one micro-batch of a step: everything random in it is a function of these numbers.

    Args:
        seed: the state's.
        step: the number of steps before this one.
        index: the number of the micro-batch in the step, over all ranks.
        device: as in `seed_generators`.

    >>> seed_microbatch(0, 3, 1); first = torch.rand(1); seed_microbatch(0, 3, 1); torch.equal(first, torch.rand(1))
    True
    """
    seed_generators(fold_in(seed, STEP, step, index), device)


def get_rng_states(device: torch.device) -> tuple[Any, ...]:
    """The states of all generators that `seed_generators` seeds, for `rng_states_equal`."""
    device_state = () if device.type == "cpu" else (_device_generator(device).get_state(),)
    numpy = np.random.get_state(legacy=False)["state"]
    return (torch.default_generator.get_state(), *device_state, numpy["key"], numpy["pos"], random.getstate())


def rng_states_equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether no random number was drawn between two calls of `get_rng_states`."""
    return all(np.array_equal(a, b) if isinstance(a, (Tensor, np.ndarray)) else a == b for a, b in zip(one, other, strict=True))


def _device_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def randn_like(tensor: Tensor, seed: int, *counters: Tensor | int) -> Tensor:
    """Standard normal numbers as a pure function of a seed and counters, without a generator.

    Args:
        tensor: gives the shape, dtype (floating) and device.
        seed: an integer, constant in a graph.
        counters: integers or 0-d integer tensors, such as the number of updates.

    Returns:
        A tensor of independent N(0, 1) values like `tensor`; the values do not depend on its sharding. Works inside a graph
        and under vmap.

    >>> like = torch.zeros(2)
    >>> torch.equal(randn_like(like, 0, 3), randn_like(like, 0, 3))
    True

    Source: SplitMix64 as a counter-based generator; the Box-Muller transform (1958).
    """
    bits = random_bits_like(tensor, seed, *counters)
    # 31 bits for the radius (never 0, so that the logarithm is finite), 31 bits for the angle
    high = ((bits >> 33) & 0x7FFFFFFF).to(torch.float64)
    low = (bits & 0x7FFFFFFF).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((high + 1.0) / 2147483648.0))
    return from_local_like((radius * torch.cos(low * (2.0 * torch.pi / 2147483648.0))).to(tensor.dtype), tensor)


def random_bits_like(tensor: Tensor, seed: int, *counters: Tensor | int) -> Tensor:
    """64 random bits for each element of a tensor, as a pure function of a seed and counters; see `randn_like`.

    Args:
        tensor: gives the shape and device.
        seed: an integer, constant in a graph.
        counters: integers or 0-d integer tensors.

    Returns:
        int64; for a DTensor, the bits of its local shard.

    >>> random_bits_like(torch.zeros(2), 0, 3).dtype
    torch.int64
    """
    index = global_indices(tensor)
    key: Tensor = torch.full((), _signed(fold_in(seed)), dtype=torch.int64, device=index.device)
    for counter in counters:
        counter = counter if isinstance(counter, Tensor) else torch.full_like(key, counter)
        key = _mix(key + (counter + 1) * _signed(0x9E3779B97F4A7C15))
    return _mix(key + (index + 1) * _signed(0x9E3779B97F4A7C15))


def _mix(z: Tensor) -> Tensor:
    # int64 wraps as uint64 does; only the right shift must be made logical
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
