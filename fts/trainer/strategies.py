"""The named choices among the arguments: string enums with Hugging Face's names and values."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):  # noqa: UP042 - a StrEnum would not be what Hugging Face's are
    """A string enum whose members equal, and print as, their values."""

    def __str__(self) -> str:
        return str(self.value)


class IntervalStrategy(Choice):
    """When to log or evaluate: never, every so many steps, or at the end of each epoch."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class SaveStrategy(Choice):
    """When to save: as `IntervalStrategy`, or whenever an evaluation is the best so far."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"


class SchedulerType(Choice):
    """How the learning rate moves after its warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"


class OptimizerNames(Choice):
    """Which optimizer; both spellings of AdamW are the same fused kernel here."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    SGD = "sgd"
