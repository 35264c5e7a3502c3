"""Callbacks: the events of a run as method calls, the state that they see, and progress displays.

It may use `arguments` and `reporting`.
"""

from fts.trainer.callbacks.base import EVENTS, TrainerCallback, overrides
from fts.trainer.callbacks.callback_state import export_callbacks, restore_callbacks, states_to_save
from fts.trainer.callbacks.displays import html_table
from fts.trainer.callbacks.early_stopping import EarlyStoppingCallback
from fts.trainer.callbacks.errors import callback_error
from fts.trainer.callbacks.flow import DefaultFlowCallback
from fts.trainer.callbacks.handler import CallbackHandler
from fts.trainer.callbacks.printer import PrinterCallback, format_logs
from fts.trainer.callbacks.progress import ProgressCallback, close_bars
from fts.trainer.callbacks.state import ExportableState, TrainerControl, TrainerState

__all__ = [
    "EVENTS",
    "CallbackHandler",
    "DefaultFlowCallback",
    "EarlyStoppingCallback",
    "ExportableState",
    "PrinterCallback",
    "ProgressCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "callback_error",
    "close_bars",
    "export_callbacks",
    "format_logs",
    "html_table",
    "overrides",
    "restore_callbacks",
    "states_to_save",
]
