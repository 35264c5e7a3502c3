"""Tokens and floating point operations that a run has spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fts.distributed import Group
from fts.steps import MicroBatches, PaddingBatch
from fts.trainer.callbacks import TrainerState
from fts.trainer.reporting import count_input_tokens
from fts.trainer.run.context import RunContext


class BatchCost(NamedTuple):
    """What a batch adds: tokens, on its device where they have to be computed, and operations."""

    tokens: int | Tensor
    operations: float


class TokenCounter:
    """Counts batches as they are trained on; counts on a device are read for logs and checkpoints only.

    Args:
        measure: from a micro-batch to what it adds; None counts nothing.
        group: the ranks over which counts are summed.
    """

    def __init__(self, measure: Callable[[Mapping[str, Any]], BatchCost] | None, group: Group | None = None) -> None:
        self.measure = measure
        self.group = Group() if group is None else group
        self.tokens: int | Tensor = 0
        self.operations = 0.0

    @classmethod
    def of(cls, context: RunContext) -> TokenCounter:
        """A counter of what the arguments and the model of a run ask for."""
        model = context.model
        mode: Any = context.args.include_num_input_tokens_seen
        name = getattr(model, "main_input_name", "input_ids")
        padding = getattr(context.processing_class, "pad_token_id", None)
        operations = _floating_point_ops(model, context.hooks.floating_point_ops, name)
        if mode == "no" and operations is None:
            return cls(None)

        def measure(batch: Mapping[str, Any]) -> BatchCost:
            return BatchCost(count_input_tokens(batch, mode, name, padding), 0.0 if operations is None else operations(batch))

        return cls(measure, context.group)

    def __bool__(self) -> bool:
        return self.measure is not None

    def add(self, batch: Any) -> None:
        """Count the batch of one update."""
        assert self.measure is not None
        for micro in batch if isinstance(batch, MicroBatches) else (batch,):
            if isinstance(micro, PaddingBatch):
                continue
            cost = self.measure(micro)
            self.tokens = self.tokens + cost.tokens
            self.operations += cost.operations

    def sync(self, trainer_state: TrainerState) -> None:
        """Add the counts of all ranks to the trainer state; each rank must call it."""
        if self.measure is None:
            return
        counts = torch.tensor([float(self.tokens), self.operations], dtype=torch.float64)
        tokens, operations = self.group.all_reduce(counts.to(self.group.device)).tolist()
        trainer_state.num_input_tokens_seen += int(tokens)
        trainer_state.total_flos += operations
        self.reset()

    def reset(self) -> None:
        """Drop what was counted since the last `sync`."""
        self.tokens, self.operations = 0, 0.0


def _floating_point_ops(
    model: nn.Module, override: Callable[[Any], Any] | None, name: str
) -> Callable[[Mapping[str, Any]], float] | None:
    """From a batch to its operations: the Trainer's override, the model's own, or 6 per parameter and input; None if unknown."""
    if override is not None:
        return lambda batch: float(override(batch))
    if callable(own := getattr(model, "floating_point_ops", None)):
        return lambda batch: float(own(batch))
    num_parameters: Any = getattr(model, "num_parameters", None)
    if not callable(num_parameters):
        return None
    # called once: a model's parameters do not change in number while it is trained
    each = 6 * int(num_parameters(exclude_embeddings=True))

    def operations(batch: Mapping[str, Any]) -> float:
        main = batch.get(name)
        return float(each * main.numel()) if isinstance(main, Tensor) else 0.0

    return operations
