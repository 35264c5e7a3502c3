"""What a search reads, copies and calls of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from fts.distributed.process_group import Group
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import CallbackHandler, TrainerControl, TrainerState
from fts.trainer.hub import HubSession
from fts.trainer.reporting import TrainerMemoryTracker


class SearchableTrainer(Protocol):
    """A trainer whose copies train the trials of a search."""

    args: TrainingArguments
    model_init: Callable[..., nn.Module] | None
    model: nn.Module
    model_wrapped: nn.Module
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    callback_handler: CallbackHandler
    state: TrainerState
    control: TrainerControl
    memory: TrainerMemoryTracker
    hub_session: HubSession
    group: Group
    world: Group
    optimizer: Any
    lr_scheduler: Any
    label_smoothing: Any
    neftune_noise_alpha: float | None
    current_gradient_accumulation_steps: int
    hp_name: Callable[[Any], str] | None
    report_to_hp_search: Callable[[Mapping[str, float], int], bool] | None
    _train_batch_size: int
    _accelerator: Any

    def train(self, *, trial: Any = None) -> Any: ...

    def evaluate(self) -> dict[str, float]: ...

    def call_model_init(self) -> nn.Module: ...
