"""TrainingArguments and Seq2SeqTrainingArguments: what a run is asked to be."""

from fts.trainer.arguments.accelerator_config import (AcceleratorConfig, check_num_steps)
from fts.trainer.arguments.conflicts import (check_conflicts, sampling_strategy)
from fts.trainer.arguments.parsing import parse_key_values
from fts.trainer.arguments.seq2seq_arguments import Seq2SeqTrainingArguments
from fts.trainer.arguments.training_arguments import TrainingArguments

__all__ = [
    "AcceleratorConfig",
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "check_num_steps",
    "check_conflicts",
    "parse_key_values",
    "sampling_strategy",
]
