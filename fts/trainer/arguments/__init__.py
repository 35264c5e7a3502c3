"""TrainingArguments and Seq2SeqTrainingArguments: what a run is asked to be."""

from fts.trainer.arguments.accelerator import AcceleratorConfig, check_accumulation
from fts.trainer.arguments.contradictions import check_contradictions, sampling_of
from fts.trainer.arguments.seq2seq import Seq2SeqTrainingArguments
from fts.trainer.arguments.texts import pairs_from_text
from fts.trainer.arguments.training import TrainingArguments

__all__ = [
    "AcceleratorConfig",
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "check_accumulation",
    "check_contradictions",
    "pairs_from_text",
    "sampling_of",
]
