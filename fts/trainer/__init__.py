"""Trainer and TrainingArguments: the functional core behind Hugging Face's interface."""

from fts.messages import check_installation
from fts.trainer.arguments import (
    AcceleratorConfig,
    HPSearchBackend,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    SaveStrategy,
    SchedulerType,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)
from fts.trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    ExportableState,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from fts.trainer.data import default_data_collator
from fts.trainer.evaluation import BestRun, EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput
from fts.trainer.search import default_compute_objective, default_hp_space_optuna, default_hp_space_ray
from fts.trainer.seq2seq import Seq2SeqTrainer
from fts.trainer.trackers import TrackerCallback
from fts.trainer.trainer import Trainer

__all__ = [
    "AcceleratorConfig",
    "BestRun",
    "CallbackHandler",
    "DefaultFlowCallback",
    "EarlyStoppingCallback",
    "EvalLoopOutput",
    "EvalPrediction",
    "ExportableState",
    "HPSearchBackend",
    "HubStrategy",
    "IntervalStrategy",
    "OptimizerNames",
    "PredictionOutput",
    "PrinterCallback",
    "ProgressCallback",
    "SaveStrategy",
    "SchedulerType",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "TrackerCallback",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "default_compute_objective",
    "default_data_collator",
    "default_hp_space_optuna",
    "default_hp_space_ray",
    "enable_full_determinism",
    "set_seed",
]

check_installation()
