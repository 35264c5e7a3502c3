"""One seed for every generator, and algorithms that give the same bits each time."""

from __future__ import annotations

import os

import torch

from fts.randomness import seed_generators
from fts.trainer.arguments.checks import check_int

DETERMINISTIC = {
    "CUDA_LAUNCH_BLOCKING": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "ASCEND_LAUNCH_BLOCKING": "1",
    "HCCL_DETERMINISTIC": "1",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}
"""Environment variables that select deterministic kernels; libraries read them when they first use the device."""


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python's, numpy's and torch's generators, the latter on every device.

    Args:
        seed: a non-negative integer.
        deterministic: whether torch must use deterministic algorithms, also where they are slower; an operation that has none
            raises.

    Raises:
        ArgumentError: the seed is negative or no integer.

    >>> set_seed(0); first = torch.rand(1); set_seed(0); torch.equal(first, torch.rand(1))
    True
    """
    check_int("seed", seed, 0, bits=63)
    torch.manual_seed(seed)  # all devices
    seed_generators(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def enable_full_determinism(seed: int, warn_only: bool = False) -> None:
    """Seed everything, and make torch, cuDNN, cuBLAS and attention kernels deterministic, for debugging: it is slow.

    Call it before the accelerator is first used, because libraries read their settings then.

    Args:
        seed: a non-negative integer.
        warn_only: whether an operation without a deterministic algorithm warns instead of raising.

    Source: https://pytorch.org/docs/stable/notes/randomness.html
    """
    set_seed(seed)
    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
