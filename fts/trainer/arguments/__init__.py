"""TrainingArguments and Seq2SeqTrainingArguments: what a run is asked to be."""

from fts.trainer.arguments.accelerator_config import AcceleratorConfig, check_accumulation
from fts.trainer.arguments.conflicts import check_contradictions, sampling_of
from fts.trainer.arguments.parsing import pairs_from_text
from fts.trainer.arguments.seq2seq_arguments import Seq2SeqTrainingArguments
from fts.trainer.arguments.training_arguments import TrainingArguments

__all__ = [
    "AcceleratorConfig",
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "check_accumulation",
    "check_contradictions",
    "pairs_from_text",
    "sampling_of",
]
