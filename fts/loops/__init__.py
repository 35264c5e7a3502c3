"""Many steps: the order of the data, events, evaluation, checkpoints and resume."""

from fts.loops.cadence import Cadence, Counters, Due, cadence
from fts.loops.checkpoints import load_checkpoint, load_extra, save_checkpoint, verify_checkpoint
from fts.loops.consolidating import consolidate_checkpoint
from fts.loops.data import Source, source
from fts.loops.evaluate import evaluate
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
from fts.loops.finding import newest_checkpoint
from fts.loops.fit import fit
from fts.loops.interrupting import StopRequest, interruptible, stopping
from fts.loops.locating import locating
from fts.loops.order import EpochSampler, length_grouped, permutation
from fts.loops.placement import on_device
from fts.loops.position import Position
from fts.loops.replaying import Replayed, replay
from fts.loops.rollback import rolling_back
from fts.loops.rotation import rotate_checkpoints
from fts.loops.sharing import share
from fts.loops.timing import Timer, every_interval
from fts.loops.window import Window
from fts.loops.writing import Writer
from fts.storage.whole import write_whole

__all__ = [
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
    "Position",
    "Replayed",
    "RolledBack",
    "Saved",
    "Source",
    "StepBegin",
    "StepEnd",
    "StopRequest",
    "Stopped",
    "Timer",
    "Window",
    "Writer",
    "cadence",
    "consolidate_checkpoint",
    "evaluate",
    "every_interval",
    "fit",
    "interruptible",
    "length_grouped",
    "load_checkpoint",
    "load_extra",
    "locating",
    "newest_checkpoint",
    "on_device",
    "permutation",
    "replay",
    "rolling_back",
    "rotate_checkpoints",
    "save_checkpoint",
    "share",
    "source",
    "stopping",
    "verify_checkpoint",
    "write_whole",
]
