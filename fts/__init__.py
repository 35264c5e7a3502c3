"""A functional training-step toolkit for PyTorch: `state = reduce(step, batches, state)`.

    fts.transforms   gradients -> updates                         (imported as tx)
    fts.steps        (state, batch) -> (state, metrics)
    fts.loops        many steps: events, data order, checkpoints  (loaded on first use)
    fts.testing      property checks for your own transforms      (loaded on first use)
    fts.trainer      Trainer and TrainingArguments                (loaded on first use, with its names)

>>> import fts, torch
>>> fts.global_norm({"w": torch.tensor([3.0, 4.0])})
tensor(5.)
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from fts import errors, steps, transforms
from fts.state import TrainState
from fts.transforms import global_norm
from fts.typing import LossOutput, Transform

if TYPE_CHECKING:
    from fts import loops as loops, testing as testing, trainer as trainer
    from fts.trainer import (
        AcceleratorConfig as AcceleratorConfig,
        BestRun as BestRun,
        CallbackHandler as CallbackHandler,
        DefaultFlowCallback as DefaultFlowCallback,
        EarlyStoppingCallback as EarlyStoppingCallback,
        EvalLoopOutput as EvalLoopOutput,
        EvalPrediction as EvalPrediction,
        ExportableState as ExportableState,
        HPSearchBackend as HPSearchBackend,
        HubStrategy as HubStrategy,
        IntervalStrategy as IntervalStrategy,
        OptimizerNames as OptimizerNames,
        PredictionOutput as PredictionOutput,
        PrinterCallback as PrinterCallback,
        ProgressCallback as ProgressCallback,
        SaveStrategy as SaveStrategy,
        SchedulerType as SchedulerType,
        Seq2SeqTrainer as Seq2SeqTrainer,
        Seq2SeqTrainingArguments as Seq2SeqTrainingArguments,
        TrackerCallback as TrackerCallback,
        Trainer as Trainer,
        TrainerCallback as TrainerCallback,
        TrainerControl as TrainerControl,
        TrainerState as TrainerState,
        TrainingArguments as TrainingArguments,
        TrainOutput as TrainOutput,
        default_compute_objective as default_compute_objective,
        default_data_collator as default_data_collator,
        default_hp_space_optuna as default_hp_space_optuna,
        default_hp_space_ray as default_hp_space_ray,
        enable_full_determinism as enable_full_determinism,
        set_seed as set_seed,
    )

__version__ = "0.1.0"

__all__ = ["LossOutput", "TrainState", "Transform", "__version__", "errors", "global_norm", "steps", "transforms"]

_LAZY_PACKAGES = ("loops", "testing", "trainer")

_LAZY_NAMES = (
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
)
"""The names of `fts.trainer` that `fts` also exports; the package is loaded when the first one is used."""


def __getattr__(name: str) -> object:
    # called only for names that the module does not have yet; the result is stored, so each is looked up once
    if name in _LAZY_PACKAGES:
        return _import_module(f"fts.{name}")  # the import system sets the attribute
    if name in _LAZY_NAMES:
        value = globals()[name] = getattr(_import_module("fts.trainer"), name)
        return value
    raise AttributeError(f"module 'fts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_PACKAGES, *_LAZY_NAMES})
