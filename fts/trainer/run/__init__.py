"""One training run: its plan, its step, its preparation or resume, the loop, and the dispatch of events to callbacks.

It may use every other subpackage but `search`, and does not know the Trainer: what it reads of one is in `RunContext`.
"""

from fts.trainer.run.batch_size import empty_cache, find_executable_batch_size, make_restore
from fts.trainer.run.checks import check_parts
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.loop import run_training
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import autocast_precision, initial_values
from fts.trainer.run.preparation import prepare_run
from fts.trainer.run.resume import saved_batch_size
from fts.trainer.run.run_mixin import RunMixin
from fts.trainer.run.step import count_update_totals, with_num_items

__all__ = [
    "Run",
    "RunContext",
    "RunMixin",
    "autocast_precision",
    "check_parts",
    "count_update_totals",
    "empty_cache",
    "find_executable_batch_size",
    "initial_values",
    "make_restore",
    "overridden",
    "prepare_run",
    "run_training",
    "saved_batch_size",
    "with_num_items",
]
