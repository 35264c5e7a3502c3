"""TrainingArguments and Seq2SeqTrainingArguments: what a run is asked to be."""

from fts.trainer.arguments.accelerator import AcceleratorConfig, accumulation_steps
from fts.trainer.arguments.contradictions import check_contradictions, check_order, sampling_of
from fts.trainer.arguments.seq2seq import Seq2SeqTrainingArguments
from fts.trainer.arguments.texts import pairs_from_text
from fts.trainer.arguments.training import TrainingArguments

__all__ = [
    "AcceleratorConfig",
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "accumulation_steps",
    "check_contradictions",
    "check_order",
    "pairs_from_text",
    "sampling_of",
]
