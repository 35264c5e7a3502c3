"""The training loop: data sources, events, evaluation, checkpoints and resume.

It uses `fts.steps`, `fts.distributed` and `fts.storage`, and knows nothing of `fts.trainer`.
"""

from fts.loops.async_checkpointer import AsyncCheckpointer
from fts.loops.cadence import Cadence, Counters, Due, cadence
from fts.loops.checkpoint_list import newest_checkpoint
from fts.loops.checkpoints import load_checkpoint, load_extra, save_checkpoint, verify_checkpoint
from fts.loops.consolidation import consolidate_checkpoint
from fts.loops.device_placement import on_device
from fts.loops.error_context import with_error_context
from fts.loops.evaluation import evaluate
from fts.loops.events import (
    EpochBegin,
    EpochEnd,
    EvalBatch,
    Evaluated,
    Event,
    Logged,
    RolledBack,
    Saved,
    StepBegin,
    StepEnd,
    Stopped,
)
from fts.loops.fit import fit
from fts.loops.metric_accumulator import MetricAccumulator
from fts.loops.position import Position
from fts.loops.preemption import StopRequest, handle_preemption, with_stop
from fts.loops.replay import ReplayedStep, replay
from fts.loops.retention import rotate_checkpoints
from fts.loops.rollback import RollbackPolicy, with_rollback
from fts.loops.sampling import EpochSampler, length_grouped_indices, permutation
from fts.loops.sharded_source import shard_source
from fts.loops.source import Source
from fts.loops.source_factory import source
from fts.loops.timer import Timer, every_interval
from fts.storage.atomic import atomic_directory

__all__ = [
    "AsyncCheckpointer",
    "Cadence",
    "Counters",
    "Due",
    "EpochBegin",
    "EpochEnd",
    "EpochSampler",
    "EvalBatch",
    "Evaluated",
    "Event",
    "Logged",
    "MetricAccumulator",
    "Position",
    "ReplayedStep",
    "RollbackPolicy",
    "RolledBack",
    "Saved",
    "Source",
    "StepBegin",
    "StepEnd",
    "StopRequest",
    "Stopped",
    "Timer",
    "atomic_directory",
    "cadence",
    "consolidate_checkpoint",
    "evaluate",
    "every_interval",
    "fit",
    "handle_preemption",
    "length_grouped_indices",
    "load_checkpoint",
    "load_extra",
    "newest_checkpoint",
    "on_device",
    "permutation",
    "replay",
    "rotate_checkpoints",
    "save_checkpoint",
    "shard_source",
    "source",
    "verify_checkpoint",
    "with_error_context",
    "with_rollback",
    "with_stop",
]
