"""Trainer and TrainingArguments: the functional core behind Hugging Face's interface."""

from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import CallbackHandler, DefaultFlowCallback, EarlyStoppingCallback, PrinterCallback, TrainerCallback
from fts.trainer.choices import IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType
from fts.trainer.collate import default_data_collator
from fts.trainer.evaluation import EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput
from fts.trainer.progress import ProgressCallback
from fts.trainer.state import ExportableState, TrainerControl, TrainerState
from fts.trainer.trainer import Trainer

__all__ = [
    "CallbackHandler",
    "DefaultFlowCallback",
    "EarlyStoppingCallback",
    "EvalLoopOutput",
    "EvalPrediction",
    "ExportableState",
    "IntervalStrategy",
    "OptimizerNames",
    "PredictionOutput",
    "PrinterCallback",
    "ProgressCallback",
    "SaveStrategy",
    "SchedulerType",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "default_data_collator",
]
