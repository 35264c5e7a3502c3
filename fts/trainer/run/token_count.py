"""Tokens and floating point operations that a run has spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts.distributed import Group
from fts.steps import MicroBatches, PaddingBatch
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.reporting.metrics import count_input_tokens
from fts.trainer.run.overrides import overridden


class Spent(NamedTuple):
    """What a batch adds: tokens, on its device where they have to be computed, and operations."""

    tokens: int | Tensor
    operations: float


class Counting:
    """Counts batches as they are trained on; a device's counts are read when somebody logs or saves.

    Args:
        measure: from a micro-batch to what it adds; None counts nothing.
        group: the processes, whose counts are added up.
    """

    def __init__(self, measure: Callable[[Mapping[str, Any]], Spent] | None, group: Group | None = None) -> None:
        self.measure = measure
        self.group = Group() if group is None else group
        self.tokens: int | Tensor = 0
        self.operations = 0.0

    @classmethod
    def of(cls, trainer: Any) -> Counting:
        """What a trainer's arguments and model ask to be counted."""
        model, args = trainer.model, trainer.args
        mode = args.include_num_input_tokens_seen
        name = getattr(model, "main_input_name", "input_ids")
        padding = getattr(trainer.processing_class, "pad_token_id", None)
        operations = _operations(trainer, name)
        if mode == "no" and operations is None:
            return cls(None)

        def measure(batch: Mapping[str, Any]) -> Spent:
            return Spent(count_input_tokens(batch, mode, name, padding), 0.0 if operations is None else operations(batch))

        return cls(measure, trainer.group)

    def __bool__(self) -> bool:
        return self.measure is not None

    def add(self, batch: Any) -> None:
        """Count the batch of one update."""
        assert self.measure is not None
        for micro in batch if isinstance(batch, MicroBatches) else (batch,):
            if isinstance(micro, PaddingBatch):
                continue
            spent = self.measure(micro)
            self.tokens = self.tokens + spent.tokens
            self.operations += spent.operations

    def settle(self, told: TrainerState) -> None:
        """Move what all processes counted to the state that callbacks see; each must call it."""
        if self.measure is None:
            return
        counted = torch.tensor([float(self.tokens), self.operations], dtype=torch.float64)
        tokens, operations = self.group.sum(counted.to(self.group.device)).tolist()
        told.num_input_tokens_seen += int(tokens)
        told.total_flos += operations
        self.tokens, self.operations = 0, 0.0

    def forget(self) -> None:
        """Drop what was counted since."""
        self.tokens, self.operations = 0, 0.0


def _operations(trainer: Any, name: str) -> Callable[[Mapping[str, Any]], float] | None:
    model = trainer.model
    if overridden(trainer, "floating_point_ops"):
        return lambda batch: float(trainer.floating_point_ops(batch))
    if callable(own := getattr(model, "floating_point_ops", None)):
        return lambda batch: float(own(batch))
    if not callable(getattr(model, "num_parameters", None)):
        return None
    # asked once: a model's parameters do not change in number while it is trained
    each = 6 * int(model.num_parameters(exclude_embeddings=True))

    def operations(batch: Mapping[str, Any]) -> float:
        main = batch.get(name)
        return float(each * main.numel()) if isinstance(main, Tensor) else 0.0

    return operations
